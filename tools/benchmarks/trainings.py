"""Comparisons of trainings: runs of train.py and what evaluates them, in processes of their own, several at a time."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import pandas as pd
import yaml

from vmamba.tools.benchmarks.report import facts_of
from vmamba.tools.devices import add_device_option
from vmamba.tools.output_files import write_csv, write_text
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import FIELDS, add_options
from vmamba.tools.training.runtime import StopRequest
from vmamba.tools.user_errors import positive, positive_float

from rich.progress import Progress

SCRIPT = Path(__file__).parents[1] / 'train.py'
RESULT = 'result.json'  # in the folder of a run that came to its end
POLL_SECONDS = 0.2
_ERROR = re.compile(r'^\S*(?:train|validate|validate_sequences|evaluate_bytes)(?:\.py)?: error: ')
Row = Dict[str, Any]


def add_run_options(parser: argparse.ArgumentParser, output: str, own: Sequence[str]) -> None:
    """Adds the options that all comparisons have, and those of a training except what is each run's own."""
    parser.add_argument('--jobs', type=positive, default=1, help='runs at once')
    add_device_option(parser)
    parser.add_argument('--timeout', type=positive_float, default=3600, help='most seconds for a run')
    parser.add_argument('--output', type=Path, default=Path(output), help='folder of the results and the runs')
    parser.add_argument('--resume', action='store_true', help='keep and continue the runs in --output')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the section')
    add_options(parser.add_argument_group('keys of the configuration, for all runs'), without=own)


class Comparison:
    """Trains and evaluates runs, several at a time; an interrupt ends all, and a later call continues them.

    Attributes:
        name: Of the command.
        kind: Named tuple of a run; its fields begin the rows.
        columns: To show of a row.
        own: Keys of the configuration that each run has for its own.
        rows: Of the runs that have ended.
    """

    name: str
    kind: type
    columns: Sequence[str]
    own: Sequence[str]

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.args, self.console, self.rows = args, open_console(), []
        self.keys = {key: value for key, value in vars(args).items() if key in FIELDS and key not in self.own}
        self.facts = facts_of(args.device, self.name, argv)

    def runs(self) -> Sequence[Any]:
        """All runs that are known so far."""
        raise NotImplementedError

    def config(self, run: Any) -> Mapping[str, Any]:
        """The configuration of a run."""
        raise NotImplementedError

    def evaluate(self, run: Any, folder: Path, ended: bool) -> Tuple[Row, str]:
        """Columns of the row of a run, whether or not it came to its end, and a message."""
        raise NotImplementedError

    def folder(self, run: Any) -> Path:
        return self.args.output / '_'.join(map(str, run))

    def run_of(self, row: Row) -> Any:
        return self.kind(*map(row.get, self.kind._fields))

    def messages(self, rows: Sequence[Row]) -> List[str]:
        """Run, status and message of each row that has a message."""
        names = [(self.folder(self.run_of(row)).name, row) for row in rows if row['message']]
        return [f'{name}: {row["status"]}: {row["message"]}' for name, row in names]

    def call(self, command: Sequence[Any], log: Path) -> Tuple[str, str]:
        """Runs a tool in a process of its own; returns 'ok', 'failed' or 'timeout', and a message."""
        return call(command, log, self.args.timeout, self.stop)

    def train(self, run: Any) -> Optional[Row]:
        """Trains and evaluates; returns what came of it, nothing if interrupted.

        An interrupted run keeps its checkpoints, from which --resume continues it.
        """
        if self.stop.signal:
            return None
        folder = self.folder(run)
        begin(folder, self.config(run))
        status, message = self.call([SCRIPT, folder / 'run.yaml', '--output', folder, '--resume'], folder / 'log.txt')
        found, evaluated = self.evaluate(run, folder, status == 'ok')
        if self.stop.signal:
            return None
        for path in (*folder.glob('*.pt'), *folder.glob('.*.part')):  # a finished run needs no weights
            path.unlink()
        shutil.rmtree(folder / 'best', ignore_errors=True)
        common = dict(status=status, epochs=len(epochs_of(folder)))
        return {**run._asdict(), **common, **found, 'message': message or evaluated}

    def train_all(self, table: str, total: int) -> bool:
        """Trains what is missing among the rows, and adds a row for each run as it ends; returns whether all have."""
        self.stop = stop = StopRequest()
        begun, running = {*map(self.run_of, self.rows)}, set()
        with ThreadPoolExecutor(self.args.jobs) as pool, Progress(console=self.console) as progress:
            bar = progress.add_task('Training', total=total, completed=len(self.rows))
            try:
                while True:
                    new = [run for run in self.runs() if run not in begun]
                    begun.update(new)
                    running |= {pool.submit(self.train, run) for run in new}
                    if not running:
                        break
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for row in filter(None, (future.result() for future in ended)):
                        self.rows.append(row)
                        write_csv(self.args.output / table, self.rows)
                        if row['status'] == 'ok':
                            write_text(self.folder(self.run_of(row)) / RESULT, json.dumps(row))
                        progress.advance(bar)
                        shown = [str(row[key]) for key in self.columns if row[key] is not None]
                        self.console.print('  '.join([*shown, row['message']]), markup=False, highlight=False)
            except BaseException:
                stop.signal = signal.SIGTERM  # ends the runs
                raise
        stop.restore()
        if stop.signal:
            self.console.print(f'Interrupted: {len(self.rows)} of {total} runs are done')
        return not stop.signal


def begin(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes run.yaml into the folder of a run, which keeps other files only if there is a checkpoint to resume."""
    if not any(folder.glob('checkpoint-*.pt')):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / 'run.yaml', yaml.safe_dump(dict(config)))


def call(command: Sequence[Any], log: Path, timeout: float, stop: StopRequest) -> Tuple[str, str]:
    """Runs a tool in a process of its own; returns 'ok', 'failed' or 'timeout', and a message."""
    start = time.monotonic()
    with log.open('w') as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={'OMP_NUM_THREADS': '1', **os.environ},  # more threads would compete for the processor
            start_new_session=True,  # so that its loading processes end with it, and Ctrl-C comes here alone
        )
        while process.poll() is None and not stop.signal and time.monotonic() < start + timeout:
            time.sleep(POLL_SECONDS)
        code = process.poll()
        with suppress(ProcessLookupError):  # where all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code is None:
        return 'timeout', f'took more than {timeout:g} s'
    return ('failed', last_error(log.read_text(errors='replace')) or f'exit status {code}') if code else ('ok', '')


def epochs_of(folder: Path) -> pd.DataFrame:
    """The epochs of a run; none where it has not done one."""
    path = folder / 'epochs.csv'
    return pd.read_csv(path) if path.is_file() else pd.DataFrame({'val_top1': []})


def last_error(log: str) -> str:
    """The message of the tool, or the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [_ERROR.sub('', line) for line in lines if _ERROR.match(line)]
    return (errors or lines or [''])[-1]


def spread(accuracies: pd.Series, form: str = '.2f') -> str:
    """Mean and standard deviation of the runs that came to their end, and how many did not."""
    values = accuracies.dropna()
    missing = f' ({len(values)} of {len(accuracies)} runs)' if len(values) < len(accuracies) else ''
    deviation = f' ± {values.std():{form}}' if len(values) > 1 else ''
    return (f'{values.mean():{form}}{deviation}' if len(values) else '-') + missing
