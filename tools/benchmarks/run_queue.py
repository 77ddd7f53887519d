"""Runs of train.py, several at once, each in a process of its own."""

import csv
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence

from vmamba.tools.output_files import write_text
from vmamba.tools.training.runtime import StopRequest
from vmamba.tools.user_errors import UserError, changes

RESULT = 'result.json'  # in the folder of a run that came to its end
SCRIPT = Path(__file__).parents[1] / 'train.py'
POLL_SECONDS = 0.2
_PARAMETERS = re.compile(r': ([\d.]+) M parameters')
_ERROR = 'train.py: error: '
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


class Run(NamedTuple):
    """What is trained.

    Attributes:
        task: Name of the task.
        model: Name of the model in the tables.
        seed: Of the weights, the order and the augmentation.
        timm_name: Name of the model in timm.
        model_args: Arguments of the model.
    """

    task: str
    model: str
    seed: int
    timm_name: str
    model_args: Dict[str, Any]

    @property
    def name(self) -> str:
        return f'{self.task}_{self.model}_{self.seed}'


class Result(NamedTuple):
    """What came of a run.

    Attributes:
        run: The run.
        status: 'ok', 'failed', 'timeout' or 'interrupted'.
        minutes: From its start to its end.
        accuracies: On the validation images after each epoch, in percent.
        parameters: Of the model, in millions; None if it was not built.
        message: What went wrong.
    """

    run: Run
    status: str
    minutes: float
    accuracies: List[float]
    parameters: Optional[float]
    message: str

    @property
    def accuracy(self) -> Optional[float]:
        """After the last epoch; None if the run did not get there."""
        return self.accuracies[-1] if self.status == 'ok' else None


class Process:
    """A running process of train.py.

    Args:
        run: What is trained.
        options: Arguments of train.py besides those of the run.
        folder: Of the run; what the process prints goes there into log.txt.
    """

    def __init__(self, run: Run, options: Sequence[str], folder: Path) -> None:
        self.run, self.folder = run, folder
        self.start = time.monotonic()
        folder.mkdir(parents=True)
        args = ('--model', run.timm_name, '--model-args', json.dumps(run.model_args), '--seed', str(run.seed))
        command = [sys.executable, str(SCRIPT), *options, *args, '--data', f'packaged/{run.task}']
        with (folder / 'log.txt').open('w') as log:
            self._process = subprocess.Popen(
                [*command, '--output', str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={'OMP_NUM_THREADS': '1', **os.environ},  # more threads would fight over the processor
                start_new_session=True,  # so that its loading processes end with it, and Ctrl-C comes here alone
                preexec_fn=_die_with_parent,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """Ends the process and its loading processes."""
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def accuracies(self) -> List[float]:
        """On the validation images, after each epoch so far."""
        path = self.folder / 'epochs.csv'
        if not path.is_file():
            return []
        with path.open() as file:
            return [float(row['val_top1']) for row in csv.DictReader(file)]

    def result(self, status: str = '', message: str = '') -> Result:
        """What came of the run, whose status, unless given, its end tells; its weights are not kept."""
        minutes = self.seconds / 60
        self.kill()
        log = (self.folder / 'log.txt').read_text(errors='replace')
        if not status and self._process.returncode:
            status, message = 'failed', _last_error(log) or f'exit status {self._process.returncode}'
        found = _PARAMETERS.search(log)
        for path in (*self.folder.glob('*.pt'), *self.folder.glob('.*.part')):
            path.unlink()
        return Result(self.run, status or 'ok', minutes, self.accuracies(), float(found[1]) if found else None, message)


def _die_with_parent() -> None:
    """Has Linux end this process when the one that started it ends, in whatever way."""
    if _LIBC:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_error(log: str) -> str:
    """The message of train.py, or the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return (errors or lines or [''])[-1]


def keep(result: Result, settings: Dict[str, Any], output: Path) -> None:
    """Writes what came of a run that came to its end into its folder."""
    content = dict(
        settings=settings,
        run=result.run._asdict(),
        minutes=result.minutes,
        accuracies=result.accuracies,
        parameters=result.parameters,
    )
    write_text(output / result.run.name / RESULT, json.dumps(content))


def kept(runs: Sequence[Run], settings: Dict[str, Any], output: Path) -> List[Result]:
    """What came of those of the runs that came to their end; the folders of the others are removed.

    Raises:
        UserError: If one of them had other settings.
    """
    results = []
    for run in runs:
        path = output / run.name / RESULT
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        now = json.loads(json.dumps({**settings, **run._asdict()}))
        differences = changes({**content['settings'], **content['run']}, now)
        if differences:
            raise UserError(f'{path.parent} is of a run with {differences}; choose another --output')
        results.append(Result(run, 'ok', content['minutes'], content['accuracies'], content['parameters'], ''))
    finished = [result.run for result in results]
    for run in runs:
        if run not in finished:
            shutil.rmtree(output / run.name, ignore_errors=True)
    return results


def train_all(
    runs: Sequence[Run],
    options: Sequence[str],
    output: Path,
    jobs: int,
    timeout: float,
    tell: Callable[[int, int], None],
) -> Iterator[Result]:
    """Trains, and yields the result of each run when it ends.

    SIGINT and SIGTERM end the current runs, as interrupted; the remaining ones do not start.

    Args:
        runs: Started in this order.
        options: Arguments of train.py besides those of a run.
        output: Folder of the folders of the runs.
        jobs: Runs at once.
        timeout: Most seconds for a run.
        tell: Called now and then with the number of current runs and of the epochs that all runs have completed.
    """
    waiting: Deque[Run] = deque(runs)
    going: List[Process] = []
    done = 0
    stop = StopRequest()
    try:
        while (waiting or going) and not stop.signal:
            while waiting and len(going) < jobs:
                run = waiting.popleft()
                going.append(Process(run, options, output / run.name))
            time.sleep(POLL_SECONDS)
            for process in list(going):
                result = _result_if_ended(process, timeout)
                if result:
                    going.remove(process)
                    done += len(result.accuracies)
                    yield result
            tell(len(going), done + sum(len(process.accuracies()) for process in going))
        while going:
            yield going.pop(0).result('interrupted')
    finally:
        for process in going:
            process.kill()


def _result_if_ended(process: Process, timeout: float) -> Optional[Result]:
    if process.has_ended:
        return process.result()
    if process.seconds > timeout:
        return process.result('timeout', f'took more than {timeout:g} s')
    return None
