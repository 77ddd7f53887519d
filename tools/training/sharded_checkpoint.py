"""Checkpoints of which every process writes a share: folders of torch.distributed.checkpoint (DCP), whole or absent."""

import itertools
import os
import pickle
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Tuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty
from vmamba.tools.output_files import cause_of, not_written, sync_folder

from .checkpoint import BROKEN, WHOLE, Checkpoints, read_file, remove

T = TypeVar('T')
_METADATA = '.metadata'  # DCP's index
# The classes of an index of tensors, which DCP would unpickle without looking.
_INDEX_CLASSES = {
    'torch': {'Size', *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    'torch.serialization': {'_get_layout'},
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.distributed.checkpoint.metadata': {
        *('Metadata', 'MetadataIndex', 'StorageMeta', 'TensorStorageMetadata', 'TensorProperties'),
        *('ChunkStorageMetadata', '_MEM_FORMAT_ENCODING'),
    },
    'pathlib': {'PosixPath', 'WindowsPath'},
    'pathlib._local': {'PosixPath', 'WindowsPath'},
}


class ShardedCheckpoints(Checkpoints):
    """Folders in which DCP keeps the sharded tensors, and the file `whole.pt` all else, checksums included.

    All processes call each method, and see the same folder. One that fails makes it fail in all.

    Args:
        folder: Of the run.
        keep: Newest ones to keep.
        mesh: Processes among which the tensors are sharded.
        group: The same processes, for what lies on the CPU.
    """

    def __init__(self, folder: Path, keep: int, mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
        super().__init__(folder, keep)
        self.mesh, self.group = mesh, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def paths(self) -> List[Path]:
        """From the newest to the oldest, as the first process sees them."""
        return self._together(super().paths)[0]

    def save(self, state: Dict[str, Any], update: int) -> Path:
        """Writes a checkpoint, then removes what is broken or too old."""
        path = self._unused(update)
        part = path.with_name(f'.{path.name}.part')
        shards, whole = _split(state)
        try:
            self._first(self.remove_parts)
            _dcp(lambda: self._write_shards(part, shards))
            sums = self._together(lambda: {file.name: _checksum(file) for file in self._share(part)})
            self._first(lambda: self._complete(part, path, dict(state=whole, files=_merge(sums))))
        except (OSError, RuntimeError) as error:
            if self.rank == 0:
                self.remove_parts()
            raise not_written(path, error) from error
        old = self.superseded(path)
        self._first(lambda: remove(old))
        return path

    def read(self, path: Path) -> Dict[str, Any]:
        """Content of a checkpoint, the sharded tensors as shards for these processes, however many wrote them."""
        if not path.is_dir():
            return super().read(path)
        content: Dict[str, Any] = {}
        self._together(lambda: content.update(read_file(path / WHOLE)))
        self._together(lambda: self._check(path, content['files']))
        shards: Dict[str, DTensor] = {}
        state = _map(content['state'], lambda key, value: self._room(key, value, shards))
        reader = _Reader(path)
        _dcp(lambda: dcp.load(shards, storage_reader=reader, planner=_TensorPlanner(), process_group=self.group))
        return state

    def _unused(self, update: int) -> Path:
        """A name that is free, since a folder cannot take the place of another at once."""
        taken, name = self.paths(), f'checkpoint-{update:08d}'
        names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(1)))
        return next(path for path in map(self.folder.joinpath, names) if path not in taken)

    def _write_shards(self, part: Path, shards: Dict[str, DTensor]) -> None:
        dcp.save(shards, storage_writer=dcp.FileSystemWriter(part, sync_files=True), process_group=self.group)

    def _complete(self, part: Path, path: Path, content: Dict[str, Any]) -> None:
        """Adds what is not in shards, and gives the folder its name once all of it is on the disk."""
        with (part / WHOLE).open('wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(part)
        part.rename(path)
        sync_folder(self.folder)

    def _share(self, path: Path) -> List[Path]:
        """The files of DCP that this process checks."""
        files = sorted(file for file in path.iterdir() if file.name != WHOLE)
        return files[self.rank :: self.world]

    def _check(self, path: Path, sums: Dict[str, int]) -> None:
        for name in sorted(sums)[self.rank :: self.world]:
            if _checksum(path / name) != sums[name]:
                raise ValueError(f'the checksum of its part {name} is wrong')

    def _room(self, key: str, value: Any, shards: Dict[str, DTensor]) -> Any:
        """A tensor for the shard that a tensor without data stands for."""
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return value
        shards[key] = empty(value.shape, dtype=value.dtype, device_mesh=self.mesh, placements=[Shard(0)])
        return shards[key]

    def _first(self, act: Callable[[], None]) -> None:
        """Lets the first process act, and the others wait for it."""
        self._together(lambda: act() if self.rank == 0 else None)

    def _together(self, act: Callable[[], T]) -> List[T]:
        """The results of all processes, in their order; the first error of any is raised in all."""
        result, error = None, None
        try:
            result = act()
        except BROKEN as caught:
            error = cause_of(caught)
        found: List[Tuple[Any, Any]] = [(None, None)] * self.world
        dist.all_gather_object(found, (result, error), group=self.group)
        errors = [text for _, text in found if text]
        if errors:
            raise OSError(errors[0])
        return [other for other, _ in found]


class _TensorPlanner(DefaultLoadPlanner):
    """Takes tensors only, not the pickled objects that DCP can keep beside them."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError('it holds pickled objects, which no checkpoint of this script does')


class _Reader(dcp.FileSystemReader):
    """Reads an index that consists of what DCP puts into one of tensors, and refuses any other."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with Path(self.path, _METADATA).open('rb') as file:
            return _IndexUnpickler(file).load()


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f'its index names {module}.{name}')
        return super().find_class(module, name)


def _dcp(act: Callable[[], None]) -> None:
    """Runs something of DCP, whose exception is no Exception, and names the errors of all processes at length."""
    try:
        act()
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(cause_of(first)) from error


def _split(state: Dict[str, Any]) -> Tuple[Dict[str, DTensor], Dict[str, Any]]:
    """The sharded tensors by the place that they have in the state, and the state with empty ones in theirs."""
    shards = {}

    def take(key: str, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shards[key] = value
        return torch.empty(value.shape, dtype=value.dtype, device='meta')

    return shards, _map(state, take)


def _map(tree: Any, change: Callable[[str, Any], Any], key: str = '') -> Any:
    """Applies a function to the leaves of nested dictionaries and lists, and to the places that they have."""
    if isinstance(tree, dict):
        return {name: _map(value, change, f'{key}/{name}') for name, value in tree.items()}
    if isinstance(tree, list):
        return [_map(value, change, f'{key}/{number}') for number, value in enumerate(tree)]
    return change(key, tree)


def _merge(parts: List[Dict[str, int]]) -> Dict[str, int]:
    return {name: value for part in parts for name, value in part.items()}


def _checksum(path: Path) -> int:
    total = 0
    with path.open('rb') as file:
        for block in _blocks(file):
            total = zlib.crc32(block, total)
    return total


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(1 << 20), b'')
