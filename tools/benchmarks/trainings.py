"""Runs of train.py and validate.py in processes of their own: what their folders and logs say."""

import re
from pathlib import Path

import pandas as pd

SCRIPT = Path(__file__).parents[1] / 'train.py'
_ERROR = re.compile(r'^\S*(?:train|validate)(?:\.py)?: error: ')


def epochs_of(folder: Path) -> pd.DataFrame:
    """The epochs of a run; none where it has not done one."""
    path = folder / 'epochs.csv'
    return pd.read_csv(path) if path.is_file() else pd.DataFrame({'val_top1': []})


def last_error(log: str) -> str:
    """The message of the tool, or the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [_ERROR.sub('', line) for line in lines if _ERROR.match(line)]
    return (errors or lines or [''])[-1]
