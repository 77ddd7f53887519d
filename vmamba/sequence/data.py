"""Bytes as a data set, and bits per byte of a model."""

import hashlib
import math
from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..layers.options import check_counts
from .generation import in_evaluation
from .model import IGNORED


class Part(NamedTuple):
    """Bytes of a file from start up to stop."""

    path: Path
    start: int
    stop: int


class ByteFiles:
    """The bytes of files, one after another; read from the disk when they are asked for.

    Args:
        parts: Of files, none of them empty.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(part.stop - part.start for part in self.parts))

    @classmethod
    def find(cls, source: Union[str, Path], pattern: str = '*') -> 'ByteFiles':
        """A file, or all files in a folder and below it, in the order of their paths; links are not followed.

        Args:
            source: File or folder.
            pattern: Of the names of the files in a folder, such as '*.py'.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If there are no bytes.
        """
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f'there is no file or folder {source}')
        paths = [source] if source.is_file() else sorted(p for p in source.rglob(pattern) if p.is_file())
        paths = [path for path in paths if path == source or not path.is_symlink()]
        parts = [Part(path, 0, path.stat().st_size) for path in paths]
        if not any(part.stop for part in parts):
            raise ValueError(f'there are no bytes in {source}')
        return cls([part for part in parts if part.stop])

    def hold_out(self, fraction: float, seed: int = 0) -> Tuple['ByteFiles', 'ByteFiles']:
        """Two parts without common files, the second with about this fraction of the bytes; of one file its end.

        Files are drawn by the seed and their content, so that equal files fall on the same side.

        Raises:
            ValueError: If the bytes are too few to divide.
        """
        if len(self.parts) == 1:
            path, start, stop = self.parts[0]
            middle = stop - round(fraction * (stop - start))
            kept, held = [Part(path, start, middle)], [Part(path, middle, stop)]
        else:
            keys = [self._key(part, seed) for part in self.parts]
            sizes: Dict[bytes, int] = defaultdict(int)
            for key, part in zip(keys, self.parts):
                sizes[key] += part.stop - part.start
            drawn, size = set(), 0
            for key in sorted(sizes):
                if size + sizes[key] / 2 <= fraction * len(self):
                    drawn.add(key)
                    size += sizes[key]
            kept = [part for key, part in zip(keys, self.parts) if key not in drawn]
            held = [part for key, part in zip(keys, self.parts) if key in drawn]
        if not (kept and held and all(part.start < part.stop for part in (*kept, *held))):
            raise ValueError(f'{len(self.parts)} file(s) of {len(self)} bytes cannot be divided by {fraction}')
        return ByteFiles(kept), ByteFiles(held)

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, stop: int) -> Tuple[Tensor, Tensor]:
        """Bytes from start up to stop, and the number of the file of each; int64 [stop - start], fewer at the end."""
        ids: List[np.ndarray] = []
        numbers: List[np.ndarray] = []
        stop = min(stop, len(self))
        number = bisect_right(self.ends, start)
        while start < stop:
            part, end = self.parts[number], min(self.ends[number], stop)
            offset = part.stop - (self.ends[number] - start)
            ids.append(self._bytes(Part(part.path, offset, offset + end - start)))
            numbers.append(np.full(end - start, number))
            start, number = end, number + 1
        joined = [np.concatenate([np.empty(0, np.int64), *arrays], dtype=np.int64) for arrays in (ids, numbers)]
        return torch.from_numpy(joined[0]), torch.from_numpy(joined[1])

    def _key(self, part: Part, seed: int) -> bytes:
        """Random by the seed, and the same for equal content."""
        salt = seed.to_bytes(16, 'big')
        return hashlib.blake2b(self._bytes(part).tobytes(), digest_size=8, salt=salt).digest()

    @staticmethod
    def _bytes(part: Part) -> np.ndarray:
        return np.fromfile(part.path, dtype=np.uint8, count=part.stop - part.start, offset=part.start)


class ByteWindows(Dataset):
    """Windows of `seq_len` bytes, one after another, and the byte that follows each of them.

    An entry is (ids, seq_idx), targets, all int64 [seq_len]. The last window is filled with targets of -100, which
    losses ignore. An entry may also be asked for by a pair (seed, index): the window then begins up to seq_len - 1
    bytes later, as the seed says.

    Args:
        files: Bytes.
        seq_len: Length of the windows.
        packed: Files are separate sequences: seq_idx has their numbers, and no first byte of a file is a target.
            Otherwise seq_idx is all zeros.
    """

    def __init__(self, files: ByteFiles, seq_len: int, packed: bool = False) -> None:
        check_counts(seq_len=seq_len)
        if len(files) < 2:
            raise ValueError(f'at least two bytes are needed, found {len(files)}')
        self.files, self.seq_len, self.packed = files, seq_len, packed

    def __len__(self) -> int:
        return math.ceil((len(self.files) - 1) / self.seq_len)

    def __getitem__(self, key: Union[int, Tuple[int, int]]) -> Tuple[Tuple[Tensor, Tensor], Tensor]:
        seed, index = key if isinstance(key, tuple) else (0, key)
        last = max(len(self.files) - 1 - self.seq_len, 0)
        start = index * self.seq_len
        start = min(start + seed % self.seq_len, max(start, last)) if seed else start
        ids, numbers = self.files.read(start, start + self.seq_len + 1)
        targets = ids[1:].clone()
        if self.packed:
            targets[numbers[1:] != numbers[:-1]] = IGNORED
        missing = self.seq_len - len(targets)
        seq_idx = numbers[:-1] - numbers[0] if self.packed else torch.zeros_like(numbers[:-1])
        return (F.pad(ids[:-1], (0, missing)), F.pad(seq_idx, (0, missing))), F.pad(
            targets, (0, missing), value=IGNORED
        )


@in_evaluation
def bits_per_byte(
    model: nn.Module,
    ids: Tensor,
    window: int,
    stride: Optional[int] = None,
    carry_state: bool = False,
    batch_size: int = 8,
) -> float:
    """Mean -log2 p(byte) of a sequence under a model, of all bytes except the first.

    Args:
        model: A `LanguageModel`.
        ids: Bytes [L], on the model's device.
        window: Bytes that pass the model at a time.
        stride: Distance of windows, at most their length, which is the default. Only bytes that no earlier window has
            predicted count: with a small stride each is predicted from nearly a window's bytes.
        carry_state: Continue each window from the state after the one before, so that every byte is predicted from all
            before it; not together with a stride.
        batch_size: Windows at a time; one with carry_state.

    Raises:
        ValueError: If an option is wrong, or there are fewer than two bytes.
    """
    stride = window if stride is None else stride
    check_counts(window=window, stride=stride, batch_size=batch_size)
    if stride > window or (carry_state and stride != window):
        raise ValueError(f'stride must be at most window, {window}, and not given with carry_state; got {stride}')
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f'ids must be [L] with at least two bytes, got {tuple(ids.shape)}')
    cache = model.allocate_cache(1, len(ids)) if carry_state else None
    ids, nats, predicted = ids.long(), ids.new_zeros((), dtype=torch.float64), 1
    while predicted < len(ids):
        start = 0 if predicted == 1 else predicted + stride - 1 - window
        whole = (len(ids) - 1 - window - start) // stride + 1  # windows from here that are not cut at the end
        count = 1 if cache is not None or predicted == 1 else max(min(batch_size, whole), 1)
        starts = [start + i * stride for i in range(count)]
        rows = torch.stack(
            [ids[first : min(first + window + 1, len(ids))] for first in starts]
        )  # [count, <= window + 1]
        logits = model(rows[:, :-1], cache=cache)
        new = rows.shape[1] - 1 if predicted == 1 else rows.shape[1] - 1 - (window - stride)
        log_p = F.cross_entropy(logits[:, -new:].flatten(0, 1).float(), rows[:, -new:].flatten(), reduction='sum')
        nats += log_p.double()
        predicted += count * new
    return nats.item() / math.log(2) / (len(ids) - 1)
