"""Checkpoints that are whole or absent."""

import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from vmamba.tools.output_files import write_atomically
from vmamba.tools.user_errors import UserError

_PATTERN = re.compile(r'checkpoint-(\d{8,})(?:_(\d+))?(\.pt)?')
WHOLE = 'whole.pt'  # in the folder of a sharded checkpoint: what is not in shards
BROKEN = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


class Checkpoints:
    """The checkpoints of a run in its folder, named by the number of updates: files, or folders of shards.

    Args:
        folder: Of the run.
        keep: Newest ones to keep; more than one, in case the newest is broken.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.broken: List[Path] = []  # newer than what was loaded; they would be kept in the place of good ones

    def paths(self) -> List[Path]:
        """From the newest to the oldest."""
        return sorted(filter(_age, self.folder.glob('checkpoint-*')), key=_age, reverse=True)

    def save(self, state: Dict[str, Any], update: int) -> Path:
        """Writes a checkpoint, then removes what is broken or too old."""
        path = self.folder / f'checkpoint-{update:08d}.pt'
        write_atomically(path, lambda file: torch.save(state, file))
        remove(self.superseded(path))
        return path

    def superseded(self, newest: Path) -> List[Path]:
        """The checkpoints that are of no use once there is this one."""
        paths = self.paths()
        broken = [path for path in paths if path in self.broken and path != newest]
        self.broken = []
        return [*broken, *[path for path in paths if path not in broken][self.keep :]]

    def remove_parts(self) -> None:
        """Removes what killed runs had begun to write."""
        remove(list(self.folder.glob('.*.part')))

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
        for number, path in enumerate(paths):
            try:
                state = self.read(path)
            except BROKEN as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                warn(f'skipped the broken checkpoint {path}, to be removed when the next one is written: {reason}')
            else:
                self.broken = paths[:number]
                return state, path
        if paths:
            raise UserError(f'all {len(paths)} checkpoints in {self.folder} are broken; restart in another --output')
        return None

    def read(self, path: Path) -> Dict[str, Any]:
        """Content of a checkpoint; of a sharded one what is not in shards, which tells whose it is."""
        return read_file(path / WHOLE)['state'] if path.is_dir() else read_file(path)


def remove(paths: List[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _age(path: Path) -> Optional[Tuple[int, int]]:
    """Place of a checkpoint among the others; None for what is none."""
    found = _PATTERN.fullmatch(path.name)
    return found and (int(found[1]), int(found[2] or 0))


def read_file(path: Path) -> Dict[str, Any]:
    """What torch.save wrote, if its checksums are right."""
    with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f'the checksum of its part {damaged} is wrong')
    return torch.load(path, map_location='cpu', weights_only=True)
