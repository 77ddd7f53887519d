"""Errors that a person can mend: one line that says what is wrong and the way out, exit code 2, no traceback."""

import argparse
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Iterable, Iterator


class UserError(Exception):
    """Something in what the person asked for; the message names the offending value and the way out."""


@contextmanager
def one_line_errors(tool: str) -> Iterator[None]:
    """Ends the process with code 2 and one line on a UserError or OSError, for the tool of this name."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f'{tool}: error: {" ".join(str(error).split())}', file=sys.stderr)
        raise SystemExit(2) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean a or b?', or nothing if no known name is near."""
    found = get_close_matches(name, list(known), n=3)
    return f'; did you mean {" or ".join(found)}?' if found else ''


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'must be a whole number above 0, got {text!r}')
    return int(text)
