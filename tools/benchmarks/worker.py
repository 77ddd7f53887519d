"""A process that measures feature extraction, one case after another."""

import json
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict

from .measure import Case, Result

COMMAND = (sys.executable, '-m', 'vmamba.tools.benchmarks.measure')


class Worker:
    """Runs measure.py in a fresh interpreter, which starts with the next case whenever there is none.

    Args:
        timeout: Most seconds for one case.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process = None

    def measure(self, case: Case) -> Result:
        """Measures a case; a process that dies or takes too long is a result too."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(asdict(case)) + '\n')
            self._process.stdin.flush()
        except BrokenPipeError:  # it has died already, which the end of its output tells
            pass
        if not select.select([self._process.stdout], [], [], self.timeout)[0]:
            self.stop()
            return Result('timeout', message=f'took more than {self.timeout:g} s')
        answer = self._process.stdout.readline()
        result = Result(**json.loads(answer)) if answer else self._died()
        if result.status == 'failed':  # an error may leave a GPU's context unusable
            self.stop()
        return result

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile('w+')
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._process = subprocess.Popen(COMMAND, text=True, **pipes)

    def _died(self) -> Result:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f'exit status {code}']
        self.stop()
        if code == -signal.SIGKILL:
            return Result('OOM', message='killed, as the system does to a process that takes too much memory')
        return Result('failed', message=lines[-1])
