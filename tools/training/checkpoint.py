"""Checkpoints that are whole or absent."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from user_errors import UserError

_NAME = 'checkpoint-{:08d}.pt'
_PATTERN = re.compile(r'checkpoint-(\d{8,})\.pt')
_BROKEN = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Puts a file in place once all of it is on the disk, so that no interruption leaves a part of it there.

    Args:
        path: Of the file.
        write: Writes the content to an open binary file.

    Raises:
        UserError: If it cannot be written, as on a full disk; a file that was there before is still there.
    """
    temporary = path.with_name(f'.{path.name}.part')
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns an OSError into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = ' '.join(str(error).split())
        raise UserError(f'cannot write {path}: {reason}; what was saved before is intact') from error


class Checkpoints:
    """The checkpoints of a run in its folder, named by the number of updates.

    Args:
        folder: Of the run.
        keep: Newest ones to keep; more than one, lest the newest be broken.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> List[Path]:
        """From the newest to the oldest."""
        found = [path for path in self.folder.glob('checkpoint-*.pt') if _PATTERN.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_PATTERN.fullmatch(path.name)[1]), reverse=True)

    def save(self, state: Dict[str, Any], update: int) -> Path:
        """Writes a checkpoint, then removes what is too old."""
        path = self.folder / _NAME.format(update)
        write_atomically(path, lambda file: torch.save(state, file))
        for old in self.paths()[self.keep :]:
            old.unlink()
        return path

    def save_best(self, state: Dict[str, Any]) -> None:
        """Writes the weights of the best score; they are all that is needed of it."""
        write_atomically(self.folder / 'best.pt', lambda file: torch.save(state, file))

    def load_newest(self, warn: Callable[[str], None]) -> Optional[Tuple[Dict[str, Any], Path]]:
        """The newest readable checkpoint; only tensors and plain values are unpickled.

        Args:
            warn: Told of every broken one that is skipped.

        Returns:
            Its content and its path, or None if there is no checkpoint.

        Raises:
            UserError: If there are only broken ones.
        """
        paths = self.paths()
        for path in paths:
            try:
                return _read(path), path
            except _BROKEN as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                warn(f'skipped the broken checkpoint {path}: {reason}')
        if paths:
            raise UserError(f'all {len(paths)} checkpoints in {self.folder} are broken; start anew in another --output')
        return None


def _read(path: Path) -> Dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f'the checksum of its part {damaged} is wrong')
    return torch.load(path, map_location='cpu', weights_only=True)
