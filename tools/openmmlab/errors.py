"""What a user can mend, said in one line by the tools for mmdet and mmseg, with exit code 2."""

import sys
from contextlib import contextmanager
from typing import Iterator, Optional

from user_errors import UserError


@contextmanager
def one_line_errors(tool: str) -> Iterator[None]:
    """Turns the errors that a user can mend into one line on standard error; others keep their traceback."""
    try:
        yield
    except (UserError, ImportError, FileNotFoundError, NotADirectoryError) as error:
        print(f'{tool}: {describe(error)}', file=sys.stderr)
        sys.exit(2)


def describe(error: Exception) -> str:
    """One line for an error."""
    package = missing_package(error)
    if package:
        return f"the package {package} is missing; install what the tools need by `pip install -e '.[mm,tools]'`"
    if isinstance(error, OSError) and error.filename:
        return f'there is no {error.filename}; correct the path in the config, or by --cfg-options'
    lines = str(error).strip().splitlines() or [type(error).__name__]
    worker = lines[0].startswith('Caught ')  # a DataLoader's worker sends its whole traceback as the message
    return lines[-1] if worker else ' '.join(str(error).split())


def missing_package(error: Optional[BaseException]) -> Optional[str]:
    """The package whose absence caused the error, directly or through the errors before it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition('.')[0]
        error = error.__cause__ or error.__context__
    return None
