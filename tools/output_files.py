"""What tools write: files that are whole or absent, in folders that one process at a time writes into."""

import errno
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Mapping, TextIO

from vmamba.tools.user_errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

LOCK = '.lock'  # file in a folder that a tool writes into


def lock_folder(folder: Path) -> TextIO:
    """Makes a folder and locks it, until the returned file is closed or this process ends in whatever way.

    The lock is that of this process alone: its loading processes, which may outlive it for seconds, do not hold it.

    Raises:
        UserError: If another process has locked the folder, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open('a')
    except OSError as error:
        raise UserError(f'cannot write into {folder}: {error.strerror}; choose another --output') from error
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others are of file systems that have no locks
            file.close()
            raise UserError(
                f'another process is writing into {folder}: wait until it ends, or choose another --output'
            ) from error
    return file


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Puts a file in place once all of it is on the disk, so that no interruption leaves a part of it there.

    Raises:
        UserError: If it cannot be written, as on a full disk; a file that was there before is still there.
    """
    temporary = part_of(path)
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns an OSError into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f'cannot write {path}: {cause_of(error)}; what was saved before is intact') from error


def part_of(path: Path) -> Path:
    """The name of a file until all of it is written."""
    return path.with_name(f'.{path.name}.part')


def write_text(path: Path, text: str) -> None:
    """Puts a text in place, see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts a table in place, see `write_atomically`; its columns are the keys of the rows."""
    import pandas as pd  # here: most processes of a training write none

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, pd.DataFrame(list(rows)).to_csv(index=False))


def write_folder(output: Path, record: str, settings: Mapping[str, Any], write: Callable[[Path], None]) -> bool:
    """Makes a folder of generated data, whole or not at all; returns False if it has this data already.

    The settings, which decide every byte, are recorded in the folder.

    Raises:
        UserError: If the folder has something else.
    """
    text = json.dumps(settings)
    if output.exists() and any(output.iterdir()):
        found = (output / record).read_text().strip() if (output / record).is_file() else 'something else'
        if found != text:
            raise UserError(f'{output} has {found} instead of {text}: move it away')
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=f'{output.name}-') as folder:
        part = Path(folder) / output.name
        part.mkdir()
        write(part)
        (part / record).write_text(text + '\n')
        part.rename(output)
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path in the error of a write that fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f'cannot write {path}: {cause_of(error)}') from error


def cause_of(error: BaseException) -> str:
    """The system's message, which PyTorch's writer replaces by its own."""
    cause = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__context__
    if cause:
        return f'{cause.strerror}: {cause.filename}' if cause.filename else cause.strerror
    return ' '.join(str(error).split()) or type(error).__name__


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk; Windows does so itself and opens no folders."""
    if os.name == 'nt':
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
