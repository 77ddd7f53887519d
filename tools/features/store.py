"""Features on disk: an interruption loses nothing that is written, and a later run continues.

A folder of features holds

- settings.json: model and settings of the features; a run with others is an error,
- progress.npy: a byte for each image, 1 once its features are written, 2 where it could not be read,
- index.csv: row, image, class folder, and state of each image when the last run began or ended,
- features of one size (`Table`): NAME.npy [images, ...], to be memory-mapped, row by row as in the index,
- else (`Files`): files/ROW.safetensors, files/ROW.npz, or files/ROW.NAME.npy.
"""

import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Sequence

import numpy as np
import pandas as pd
from numpy.lib.format import open_memmap
from safetensors.numpy import load_file, save

from vmamba.tools.output_files import LOCK, lock_folder, part_of, write_csv, write_text
from vmamba.tools.user_errors import UserError, changes

Features = Dict[str, np.ndarray]
TODO, DONE, UNREADABLE = 0, 1, 2
STATES = ('todo', 'done', 'unreadable')
FORMATS = ('npy', 'safetensors', 'npz')
_CHUNK = 2**22  # bytes
_FREE = {'features', 'format', 'precision', 'save_dtype', 'images', 'images_sha256'}  # between two extractions


class Store:
    """A folder of features: settings, progress and index.

    Args:
        folder: Where to write.
        paths: The images.
        settings: Of the features, as values of JSON.
        overwrite: Discard the features in the folder instead of continuing.
        lock: Keep other runs out of the folder; False for further processes of a run that has locked it.

    Raises:
        UserError: If something else is there.
    """

    def __init__(
        self, folder: Path, paths: Sequence[Path], settings: Dict[str, Any], overwrite: bool, lock: bool = True
    ) -> None:
        self.folder, self.paths = folder, paths
        record, progress = folder / 'settings.json', folder / 'progress.npy'
        begins = {folder / LOCK, part_of(record)}  # files of a run at its start
        if folder.exists() and not record.is_file() and any(path not in begins for path in folder.iterdir()):
            raise UserError(f'{folder} holds something other than features: give another --output')
        self.lock = lock_folder(folder) if lock else nullcontext()  # of this folder, until it is closed
        if record.is_file() and overwrite:
            _remove(folder)
        if record.is_file():
            _check_same(read_settings(folder), settings, folder)
        else:
            write_text(record, json.dumps(settings, indent=1))
        self._progress = _array(progress, np.dtype(np.uint8), (len(paths),))

    def todo(self) -> List[int]:
        """Rows that are not written yet; those that could not be read are tried again."""
        return np.flatnonzero(self._progress != DONE).tolist()

    def mark(self, rows: Iterable[int], state: int) -> None:
        """Notes the state of rows, whose features must be on disk by now."""
        self._progress[list(rows)] = state
        self._progress.flush()

    def write_index(self, labels: Sequence[str]) -> None:
        """Writes index.csv."""
        states = [STATES[state] for state in self._progress]
        rows = enumerate(zip(self.paths, labels, states))
        write_csv(self.folder / 'index.csv', (dict(row=i, image=p, label=name, state=s) for i, (p, name, s) in rows))


class Table(Store):
    """Features that have the same shape for all images, in one memory-mapped array each."""

    def write(self, rows: Sequence[int], features: Features) -> None:
        """Writes features [n, ...] of n rows."""
        for name, values in features.items():
            array = self.array(name, values)
            array[list(rows)] = values
            array.flush()  # before the rows count as done
        self.mark(rows, DONE)

    def array(self, name: str, values: np.ndarray) -> np.memmap:
        """The array [images, ...] of a feature that has such values [n, ...]."""
        return _array(self.folder / f'{name}.npy', values.dtype, (len(self.paths), *values.shape[1:]))


class Files(Store):
    """Features of images of various sizes, in files of their own."""

    def __init__(
        self, folder: Path, paths: Sequence[Path], settings: Dict[str, Any], overwrite: bool, lock: bool = True
    ) -> None:
        super().__init__(folder, paths, settings, overwrite, lock)
        self._format = settings['format']
        (folder / 'files').mkdir(exist_ok=True)

    def write(self, rows: Sequence[int], features: Features) -> None:
        """Writes features [n, ...] of n rows."""
        for i, row in enumerate(rows):
            arrays = {}
            for name, values in features.items():
                arrays[name] = self.allocate(row, name, values[i].shape, values.dtype)
                arrays[name][...] = values[i]
            self.finish(row, arrays)

    def allocate(self, row: int, name: str, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array to fill before `finish`: a memory-mapped file where the format is npy."""
        if self._format != 'npy':
            return np.empty(shape, dtype)
        return _new_array(self._path(row, f'.{name}.npy.tmp'), dtype, shape)

    def finish(self, row: int, features: Features) -> None:
        """Writes the arrays of one image, which are from `allocate`; each file appears whole or not at all."""
        if self._format == 'npy':
            for name, array in features.items():
                array.flush()
                os.replace(self._path(row, f'.{name}.npy.tmp'), self._path(row, f'.{name}.npy'))
        else:
            temporary = self._path(row, '.tmp')
            with _room_for(temporary), temporary.open('wb') as file:
                if self._format == 'npz':
                    np.savez(file, **features)
                else:
                    file.write(save(features))
            os.replace(temporary, self._path(row, f'.{self._format}'))
        self.mark([row], DONE)

    def _path(self, row: int, suffix: str) -> Path:
        return self.folder / 'files' / f'{row:08d}{suffix}'


def _check_same(before: Dict[str, Any], settings: Dict[str, Any], folder: Path) -> None:
    different = changes(before, json.loads(json.dumps(settings)))
    if different:
        raise UserError(f'{folder} has features with {different}: give another --output, or --overwrite to start again')


def _remove(folder: Path) -> None:
    """Removes the features and no other files."""
    names = read_settings(folder).get('features', [])
    shutil.rmtree(folder / 'files', ignore_errors=True)
    for name in ('index.csv', 'run.json', *(f'{name}.npy' for name in names), 'progress.npy', 'settings.json'):
        (folder / name).unlink(missing_ok=True)


def _array(path: Path, dtype: np.dtype, shape: Sequence[int]) -> np.memmap:
    """A memory-mapped file to write to, of zeros if it is new; a kill leaves a whole file or none."""
    if not path.is_file():
        temporary = path.with_suffix('.tmp')
        _new_array(temporary, dtype, shape).flush()
        os.replace(temporary, path)
    return open_memmap(path, mode='r+')


def _new_array(path: Path, dtype: np.dtype, shape: Sequence[int]) -> np.memmap:
    """A memory-mapped file of zeros with all its room on the disk: writing to a page without kills the process."""
    with _room_for(path):
        array = open_memmap(path, mode='w+', dtype=dtype, shape=tuple(shape))
        with path.open('r+b') as file:
            _reserve(file, path.stat().st_size)
    return array


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Turns a full disk, or whatever else prevents writing, into a UserError, and removes the part that is there."""
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f'cannot write {path}: {error.strerror}; make room and run the same command again, or give another --output'
        ) from error


def _reserve(file: BinaryIO, size: int) -> None:
    """Gives a sparse file its place on the disk."""
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_SET)  # macOS has no such call: reading and writing the same makes the place
    while chunk := file.read(_CHUNK):
        file.seek(-len(chunk), os.SEEK_CUR)
        file.write(chunk)
    file.flush()


def read_index(folder: Path) -> pd.DataFrame:
    """The texts of index.csv, with the states of progress.npy: after a kill those of the index are of the run's start.

    Raises:
        UserError: If there is none.
    """
    path = folder / 'index.csv'
    if not path.is_file():
        raise UserError(f'{folder} holds no features (no index.csv): `vmamba extract` writes them')
    index = pd.read_csv(path, dtype=str, keep_default_na=False)
    return index.assign(state=[STATES[state] for state in np.load(folder / 'progress.npy')])


def read_settings(folder: Path) -> Dict[str, Any]:
    """What the features of a folder are of."""
    return json.loads((folder / 'settings.json').read_text())


def check_comparable(folder: Path, other: Path) -> None:
    """Raises UserError unless the features of both folders are those of one model on images preprocessed alike."""
    ours, theirs = read_settings(folder), read_settings(other)
    for settings in (ours, theirs):
        if settings['weights_sha256']:
            settings['model'] = settings['model'].partition('=')[0]  # the same file may have another path
    different = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    pairs = [f'{key} {ours.get(key)!r} and {theirs.get(key)!r}' for key in sorted({*different} - _FREE)]
    if pairs:
        raise UserError(f'{folder} and {other} differ in {", ".join(pairs)}: extract both alike')


def read_features(folder: Path, name: str, rows: Sequence[int]) -> List[np.ndarray]:
    """A feature of these rows; arrays are memory-mapped where they are of the format npy.

    Raises:
        UserError: If there is no such feature.
    """
    settings = read_settings(folder)
    if name not in settings['features']:
        raise UserError(f'{folder} has no feature {name!r}; it has {", ".join(settings["features"])}')
    if (folder / f'{name}.npy').is_file():
        table = np.load(folder / f'{name}.npy', mmap_mode='r')
        return [table[row] for row in rows]
    return [_read_file(folder / 'files' / f'{row:08d}', settings['format'], name) for row in rows]


def _read_file(stem: Path, form: str, name: str) -> np.ndarray:
    if form == 'npy':
        return np.load(f'{stem}.{name}.npy', mmap_mode='r')
    if form == 'safetensors':
        return load_file(f'{stem}.safetensors')[name]
    with np.load(f'{stem}.npz') as file:
        return file[name]
