"""Command-line tools; `vmamba COMMAND` and `python tools/COMMAND.py` run them."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Optional, Type

from .user_errors import describe

# The packages of the extras are imported after this one (ruff sorts them so), so that a missing one is a line here too.
if sys.argv[0] == '-m' or Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:

    def _excepthook(kind: Type[BaseException], error: BaseException, traceback: Optional[TracebackType]) -> None:
        """Reports a missing package in one line and exits with code 2; other errors keep their traceback."""
        if not isinstance(error, ModuleNotFoundError):
            return sys.__excepthook__(kind, error, traceback)
        print(f'{Path(sys.argv[0]).name}: error: {describe(error)}', file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = _excepthook
