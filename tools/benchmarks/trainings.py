"""Runs of train.py and what evaluates them in processes of their own, several at a time, from call to call."""

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
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import pandas as pd
import yaml

from vmamba.tools.output_files import write_csv, write_text
from vmamba.tools.training.runtime import StopRequest

from rich.console import Console
from rich.progress import Progress

SCRIPT = Path(__file__).parents[1] / 'train.py'
RESULT = 'result.json'  # in the folder of a run that came to its end
POLL_SECONDS = 0.2
_ERROR = re.compile(r'^\S*(?:train|validate|validate_sequences|evaluate_bytes)(?:\.py)?: error: ')
Row = Dict[str, Any]


def run_all(
    kind: type,
    runs: Callable[[], Sequence[Any]],
    train: Callable[[Any, StopRequest], Optional[Row]],
    rows: List[Row],
    output: Path,
    table: str,
    columns: Sequence[str],
    jobs: int,
    total: int,
    console: Console,
) -> bool:
    """Trains what is missing among the rows, and adds a row for each run as it ends; returns whether all have ended.

    An interrupt ends all runs.

    Args:
        kind: Named tuple of a run, with a `name`; its fields are in the rows.
        runs: All that are known so far.
        train: Runs one; returns its row with status and message, None if it was interrupted.
        rows: Of what is done.
        output: Folder of the folders of runs.
        table: Name of the CSV file there.
        columns: To show of a row.
        jobs: Runs at once.
        total: Number of runs in the end.
        console: Where to show.
    """
    begun, running, stop = {kind(*map(row.get, kind._fields)) for row in rows}, set(), StopRequest()
    with ThreadPoolExecutor(jobs) as pool, Progress(console=console) as progress:
        bar = progress.add_task('Training', total=total, completed=len(rows))
        try:
            while True:
                new = [run for run in runs() if run not in begun]
                begun.update(new)
                running |= {pool.submit(train, run, stop) for run in new}
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for row in filter(None, (future.result() for future in ended)):
                    rows.append(row)
                    write_csv(output / table, rows)
                    if row['status'] == 'ok':
                        write_text(output / kind(*map(row.get, kind._fields)).name / RESULT, json.dumps(row))
                    progress.advance(bar)
                    shown = [str(row[key]) for key in columns if row[key] is not None]
                    console.print('  '.join([*shown, row['message']]), markup=False, highlight=False)
        except BaseException:
            stop.signal = signal.SIGTERM  # ends the runs
            raise
    stop.restore()
    if stop.signal:
        console.print(f'Interrupted: {len(rows)} of {total} runs are done')
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


def drop_weights(folder: Path) -> None:
    """Removes weights and checkpoints from the folder of a run."""
    for path in (*folder.glob('*.pt'), *folder.glob('.*.part')):
        path.unlink()
    shutil.rmtree(folder / 'best', ignore_errors=True)


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
