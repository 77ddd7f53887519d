"""Tools in processes that are forked from this one, which saves them the imports."""

import contextlib
import os
import signal
import socket
import sys
import traceback


class Forked:
    """A tool's `main` in a process of its own, with the interface of subprocess.Popen.

    Args:
        main: What it calls.
        args: Of the command line.
        env: Changes of the environment.
        start_new_session: The process leads a group, as that of a shell's job.
    """

    def __init__(self, main, *args, env=None, start_new_session=False):
        pipes = [os.pipe() for _ in range(2)]
        sys.stdout.flush()
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            os.environ.update(env or {})
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            sys.stdout, sys.stderr = (os.fdopen(number, 'w', buffering=1) for number in (1, 2))
            os._exit(_status_of(main, args))
        for _, end in pipes:
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(start) for start, _ in pipes)

    def poll(self):
        return self._reap(os.WNOHANG)

    def wait(self):
        return self._reap(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it said until it, and those that it started, ended."""
        said = self.stdout.read(), self.stderr.read()
        self.wait()
        return said

    def _reap(self, options):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _status_of(main, args):
    try:
        main([str(arg) for arg in args])
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def two_processes(main, *args):
    """Two processes with the environment that torchrun gives them, which are killed at the end."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        common = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': '2'}
    ranks = [dict(common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    processes = [Forked(main, *args, env=env) for env in ranks]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
