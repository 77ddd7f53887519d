"""User errors: one line that says what is wrong and what to do, exit code 2, no traceback."""

import argparse
import math
import os
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

# Packages of each extra, other than `tools`.
_EXTRAS = {
    'mm,tools': ('cv2', 'mmcv', 'mmdet', 'mmengine', 'mmseg', 'pycocotools', 'terminaltables'),
    'medical': ('dynamic_network_architectures', 'monai', 'nibabel', 'nnunetv2'),
    'text': ('transformers',),
    'export,tools': ('onnx', 'onnxruntime', 'onnxscript'),
}


class UserError(Exception):
    """An error in the input; the message names the offending value and what to do."""


@contextmanager
def one_line_errors(tool: str) -> Iterator[None]:
    """Prints user errors as one line and ends the process with code 2, for the tool of this name.

    User errors are UserError, OSError and missing packages; other errors keep their traceback.
    """
    try:
        yield
    except (UserError, OSError, ImportError) as error:
        rank = os.environ.get('RANK')  # of torchrun's processes
        place = f' [process {rank}]' if rank else ''
        print(f'{program(tool)}: error:{place} {describe(error)}', file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@contextmanager
def as_user_error(what: str = '', *kinds: Type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds, by default what libraries raise for wrong input, into UserErrors of one line."""
    kinds = kinds or (OSError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except kinds as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{what}: {reason}' if what else reason) from error


def program(tool: str) -> str:
    """The program that an error names: 'vmamba train' under the command vmamba, else the tool's own file."""
    return sys.argv[0] if sys.argv[0].startswith('vmamba ') else tool


def describe(error: Exception) -> str:
    """One line for an error."""
    if isinstance(error, ImportError):
        package = missing_package(error)
        what = f'the package {package} is missing' if package else ' '.join(str(error).split())
        extras = next((extra for extra, packages in _EXTRAS.items() if package in packages), 'tools')
        return f"{what}; install it by `pip install 'vmamba[{extras}]'`"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith('Caught '):  # a DataLoader's worker sends its whole traceback as the message
        return lines[-1]
    if isinstance(error, FileNotFoundError) and error.filename:
        return f'there is no {error.filename}'
    return ' '.join(str(error).split())


def missing_package(error: Optional[BaseException]) -> Optional[str]:
    """The package whose absence caused the error, directly or through the errors before it."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition('.')[0]
        error = error.__cause__ or error.__context__
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean a or b?', or nothing if no known name is near."""
    found = get_close_matches(name, list(known), n=3)
    return f'; did you mean {" or ".join(found)}?' if found else ''


def listed(names: Sequence[Any], most: int) -> str:
    """'a, b', or of more names than `most` the first and 'and 3 more'."""
    return ', '.join(map(str, names[:most])) + (f' and {len(names) - most} more' if len(names) > most else '')


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'key 1, now 2; other 3, now 4' for the values that differ, sorted by key, or nothing."""
    return '; '.join(f'{key} {was.get(key)!r}, now {now[key]!r}' for key in sorted(now) if was.get(key) != now[key])


class Parser(argparse.ArgumentParser):
    """A parser of the command line that names the nearest of an unknown option and takes no abbreviations."""

    def __init__(self, description: Optional[str] = None, **kwargs: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **kwargs)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Tuple[argparse.Namespace, List[str]]:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        for text in unknown:
            name = text.partition('=')[0]
            if name.startswith('-'):
                self.error(f'unknown option {name!r}{nearest(name, self._option_string_actions)}')
        return namespace, unknown


def at_least(lowest: int) -> Callable[[str], int]:
    """A whole number not below this one, for argparse."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f'must be a whole number above {lowest - 1}, got {text!r}')
        return int(text)

    return parse


positive = at_least(1)


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'must be a number above 0, got {text!r}')
    return value


def file_name(suffix: str) -> Callable[[str], Path]:
    """A reader, for argparse, of the name of a file to write that has this suffix."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix or path.is_dir():
            raise argparse.ArgumentTypeError(f'must be a file that ends with {suffix}, got {text!r}')
        return path

    return read
