"""Launches of the selective scan's kernels: how they cut their work, by the sizes of the scan and the GPU."""

import functools
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._launch import Launcher, cdiv, is_nvidia, next_power_of_2, num_processors
from .backward import scan_backward_kernel
from .forward import combine_kernel, scan_kernel, summary_kernel
from .layout import pack_kernel, total_kernel, unpack_kernel
from .tiles import PACKED as _PACKED

PACKED = getattr(_PACKED, 'value', _PACKED)  # steps between saved states
MAX_STATES = 64
_THREAD_STATES = 4  # that a thread takes, at most
_COMBINE_BLOCK = 64, 32  # subchunks, and pairs of a state and a channel
_TOTAL_BLOCK = 32, 32  # parts of gradients, and of parameters

_scan = Launcher(scan_kernel)
_scan_backward = Launcher(scan_backward_kernel)
_summary = Launcher(summary_kernel)
_combine = Launcher(combine_kernel)
_pack = Launcher(pack_kernel)
_unpack = Launcher(unpack_kernel)
_total = Launcher(total_kernel)


class MoveBlock(NamedTuple):
    """What a program of `layout.py` moves: so many tiles of PACKED steps of block_n states."""

    packed: int
    tiles: int
    block_n: int


class Tile(NamedTuple):
    """Steps, states of all warps at once, and channels of a tile, and states that a warp takes one after the other."""

    block_l: int
    block_n: int
    block_d: int
    states: int


class Flags(NamedTuple):
    softplus: bool
    directions: int
    reverse: bool
    channels_last: bool
    exact: bool
    nvidia: bool


class Config(NamedTuple):
    """How a pass cuts its work.

    Args:
        block_d: Channels of a program.
        warps: Warps of a program, which share the states.
        chunks: Parts of L that are walked in parallel; 0 chooses by the sizes.
        subchunks: Parts of a chunk that the pass before walks in parallel; 0 chooses by the sizes.
        splits: Programs that share the channels of a group in the backward pass; 0 chooses by the sizes.
        min_warps: Warps that a multiprocessor should have at least.
        min_tiles: Fewest tiles of a chunk or subchunk that is chosen.
    """

    block_d: int = 32
    warps: int = 4
    chunks: int = 0
    subchunks: int = 0
    splits: int = 0
    min_warps: int = 12
    min_tiles: int = 4

    def fit(self, dstate: int) -> 'Config':
        """With no more warps than states, and enough to have all states at once in registers."""
        warps = max(self.warps, next_power_of_2(cdiv(dstate, _THREAD_STATES)))
        return self._replace(warps=min(warps, next_power_of_2(dstate)))

    @property
    def num_warps(self) -> int:
        return self.warps * max(self.block_d // 32, 1)

    @property
    def programs_per_processor(self) -> int:
        return cdiv(self.min_warps, self.num_warps)

    @property
    def registers(self) -> int:
        """Of a thread, as many as that many programs can have of the 65536 of a multiprocessor, dealt out in eights.

        They hold what is loaded before it is needed: fewer for more warps were slower.
        """
        return min(65536 // (32 * self.num_warps * self.programs_per_processor) // 8 * 8, 255)

    def tile(self, steps: int, dstate: int) -> Tile:
        return Tile(steps, self.warps, self.block_d, cdiv(dstate, self.warps))

    def slots(self, tensor: Tensor) -> int:
        """Programs that run at the same time."""
        return num_processors(tensor) * self.programs_per_processor


CONFIG = Config()


class Cut(NamedTuple):
    """How L is cut: `chunks` of `chunk_tiles` tiles are walked in parallel, of which the last may have fewer; the pass
    before, which finds the state at the end of each chunk, walks `subchunks` of each in parallel."""

    chunks: int
    chunk_tiles: int
    subchunks: int


class Scan(NamedTuple):
    """The tensors of a scan as the kernels take them.

    Sequences are [batch, dim, L], B and C [batch, groups, N, L]. Where two directions are walked at once (the second one
    against the sequence), sequences are [batch, 2, dim, L], B and C [batch, 2, N, L], and parameters have a first
    dimension of 2. All but sequences, B and C are contiguous; A is fp32.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor]
    z: Optional[Tensor]
    delta_bias: Optional[Tensor]
    initial: Optional[Tensor]
    softplus: bool
    reverse: bool

    @property
    def directions(self) -> int:
        return self.u.shape[1] if self.u.ndim == 4 else 1

    @property
    def groups(self) -> int:
        return 1 if self.directions > 1 else self.B.shape[1]

    @property
    def sizes(self) -> Tuple[int, int, int, int]:
        """Batch, channels, length, states."""
        return self.u.shape[0], self.u.shape[-2], self.u.shape[-1], self.A.shape[-1]

    @property
    def entries(self) -> int:
        """Directions of elements of the batch."""
        return self.u.shape[0] * self.directions


class ScanGradients(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor]
    z: Optional[Tensor]
    delta_bias: Optional[Tensor]
    initial: Tensor


class Targets(NamedTuple):
    """Where gradients are written: those of u, delta and z with the same strides."""

    u: Tensor
    delta: Tensor
    z: Optional[Tensor]
    B: Tensor
    C: Tensor


def states_shape(u: Tensor, A: Tensor) -> Tuple[int, ...]:
    """What `scan_forward` saves: states before each PACKED steps and after the last, [batch, tiles + 1, N, dim]."""
    return u.shape[0], cdiv(u.shape[2], PACKED) + 1, A.shape[1], A.shape[0]


def scan_forward(scan: Scan, y: Tensor, save: bool, config: Optional[Config] = None) -> Tuple[Tensor, Tensor]:
    """Fills y; returns the last state [entries, dim, N] and, with `save`, the states before each tile and after the last,
    [entries, tiles + 1, N, dim]; entries are directions of elements of the batch."""
    _, dim, length, dstate = scan.sizes
    config = (config or CONFIG).fit(dstate)
    programs, tiles = scan.entries * cdiv(dim, config.block_d), cdiv(length, PACKED)
    cut = _cut(config, tiles, programs, programs, scan.u)
    num_states, chunk_states = (tiles + 1, cut.chunk_tiles) if save else (cut.chunks, 1)
    states = scan.A.new_empty(scan.entries, num_states, dstate, dim)
    last = scan.A.new_empty(scan.entries, dim, dstate)
    B, C = _pack_coefficients(scan, config)
    if cut.chunks > 1:
        _summarise(scan, scan.u, None, B, scan.initial, states, chunk_states, cut, config)
    sequences = scan.u, scan.delta, scan.z, y
    _launch_scan(
        _scan,
        (programs, cut.chunks),
        (scan.u, scan.delta, scan.A, B, C, scan.D, scan.z, scan.delta_bias, scan.initial, y, last, states),
        (length, dim, dstate, dim // scan.groups, cut.chunk_tiles, chunk_states, num_states),
        sequences,
        (cut.chunks > 1, save, config.tile(PACKED, dstate), _flags_of(scan, sequences)),
        config,
    )
    return last, states


def empty_targets(scan: Scan) -> Targets:
    """New tensors, laid out like the sequences."""
    batch, dim, length, _ = scan.sizes
    last = _channels_last((scan.u, scan.delta, scan.z))

    def sequence(dtype: torch.dtype) -> Tensor:
        grad = scan.u.new_empty((batch, length, dim) if last else (batch, dim, length), dtype=dtype)
        return grad.transpose(1, 2) if last else grad

    z = None if scan.z is None else sequence(scan.z.dtype)
    coefficients = (tensor.new_empty(tensor.shape) for tensor in (scan.B, scan.C))
    return Targets(sequence(scan.u.dtype), sequence(scan.delta.dtype), z, *coefficients)


def scan_backward(
    scan: Scan,
    grad_y: Tensor,
    grad_last: Optional[Tensor],
    states: Tensor,
    targets: Targets,
    log_A: bool = False,
    config: Optional[Config] = None,
) -> ScanGradients:
    """Gradients of all tensors, those of `targets` written there; with `log_A` that of log(-A) in place of A's."""
    _, dim, length, dstate = scan.sizes
    config = (config or CONFIG).fit(dstate)
    entries, group_dim, tiles = scan.entries, dim // scan.groups, cdiv(length, PACKED)
    blocks = cdiv(group_dim, config.block_d)
    splits = min(blocks, config.splits or _splits(entries * scan.groups, blocks, config.slots(scan.u)))
    split_blocks = cdiv(blocks, splits)
    splits = cdiv(blocks, split_blocks)
    programs = entries * scan.groups * splits
    cut = _cut(config, tiles, programs, entries * cdiv(dim, config.block_d), scan.u)
    B, C = _pack_coefficients(scan, config)
    adjoints = scan.A.new_empty(entries, cut.chunks, dstate, dim)
    if cut.chunks > 1:
        _summarise(scan, grad_y, scan.z, C, grad_last, adjoints, 1, cut, config)
    sums = scan.A.new_empty(entries, cut.chunks, 2 + dstate, dim)
    grad_BC = scan.A.new_empty(splits, entries * scan.groups, tiles, _padded(config, dstate), 2, PACKED)
    inputs = grad_y, grad_last, scan.u, scan.delta, scan.A, B, C, scan.D, scan.z, scan.delta_bias, states
    sequences = grad_y, scan.u, scan.delta, scan.z, targets.u
    _launch_scan(
        _scan_backward,
        (programs, cut.chunks),
        (*inputs, adjoints, sums, targets.u, targets.delta, targets.z, grad_BC),
        (length, dim, dstate, group_dim, splits, split_blocks, states.shape[1], cut.chunk_tiles),
        sequences,
        (cut.chunks > 1, log_A, config.tile(PACKED // 2, dstate), _flags_of(scan, sequences)),
        config,
    )
    _move_coefficients(_unpack, scan, (grad_BC, targets.B, targets.C), (targets.B, targets.C), (splits,), config)
    grad_A, grad_D, grad_bias = (
        None if parameter is None else torch.empty_like(parameter, dtype=torch.float32)
        for parameter in (scan.A, scan.D, scan.delta_bias)
    )
    block_l, block_d = _TOTAL_BLOCK
    _total(
        (cdiv((2 + dstate) * dim, block_d), scan.directions),
        (sums, grad_D, grad_bias, grad_A),
        (entries // scan.directions * cut.chunks, cut.chunks, dim, dstate),
        _TOTAL_BLOCK,
    )
    initial = adjoints[:, -1].transpose(1, 2)
    return ScanGradients(targets.u, targets.delta, grad_A, targets.B, targets.C, grad_D, targets.z, grad_bias, initial)


def _cut(config: Config, tiles: int, programs: int, summary_programs: int, tensor: Tensor) -> Cut:
    """As few chunks, of as few subchunks, as fill the processors.

    Args:
        programs: Programs of a chunk.
        summary_programs: Programs of a chunk in the pass before.
    """
    slots = config.slots(tensor)
    chunks = config.chunks or min(slots // programs, tiles // config.min_tiles)
    chunks = max(1, min(chunks, tiles))
    chunk_tiles = cdiv(tiles, chunks)
    subchunks = 1
    if chunks > 1:
        subchunks = config.subchunks or min(slots // (summary_programs * (chunks - 1)), chunk_tiles // config.min_tiles)
        subchunks = max(1, min(subchunks, chunk_tiles))
        chunk_tiles = cdiv(chunk_tiles, subchunks) * subchunks
    return Cut(cdiv(tiles, chunk_tiles), chunk_tiles, subchunks)


@functools.cache
def _splits(rows: int, blocks: int, slots: int) -> int:
    """Among how many programs the `blocks` of each of `rows` are dealt: the fewest with which all finish first."""

    def time(splits: int) -> int:
        return cdiv(rows * splits, slots) * cdiv(blocks, splits)

    return min(range(1, blocks + 1), key=time)


def _padded(config: Config, dstate: int) -> int:
    """States that packed B and C have room for."""
    return cdiv(dstate, config.warps) * config.warps


def _strides_of(tensor: Optional[Tensor]) -> Tuple[int, ...]:
    """Strides of [batch, 2, dim, L], or of [batch, dim, L] with 0 for the direction; all 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    return strides if len(strides) == 4 else (strides[0], 0, *strides[1:])


def _channels_last(sequences: Tuple[Optional[Tensor], ...]) -> bool:
    """Whether the channels of a step are neighbours in all sequences."""
    return all(s.stride(-2) == 1 for s in sequences if s is not None) and sequences[0].stride(-1) != 1


def _flags_of(scan: Scan, sequences: Tuple[Optional[Tensor], ...]) -> Flags:
    exact = scan.u.dtype != torch.bfloat16
    channels_last = _channels_last(sequences)
    return Flags(scan.softplus, scan.directions, int(scan.reverse), channels_last, exact, is_nvidia(scan.u))


def _launch_scan(
    kernel: Launcher,
    grid: Tuple[int, int],
    tensors: tuple,
    sizes: tuple,
    sequences: Tuple[Optional[Tensor], ...],
    constants: tuple,
    config: Config,
) -> None:
    strides = tuple([_strides_of(sequence) for sequence in sequences])
    registers = config.registers if is_nvidia(tensors[0]) else None
    kernel(grid, tensors, (*sizes, *strides), constants, config.num_warps, registers, stages=1)


def _move_coefficients(
    kernel: Launcher, scan: Scan, tensors: tuple, pair: Tuple[Tensor, Tensor], more: tuple, config: Config
) -> None:
    """Launches `pack_kernel` or `unpack_kernel` on a `pair` [batch, groups, N, L] of B's and C's."""
    _, _, length, dstate = scan.sizes
    padded = _padded(config, dstate)
    batch, groups = pair[0].shape[:2]
    block = MoveBlock(PACKED, 4, min(16, next_power_of_2(padded)))
    kernel(
        2 * batch * groups * cdiv(padded, block.block_n) * cdiv(cdiv(length, PACKED), block.tiles),
        tensors,
        (length, dstate, padded, batch * groups, groups, *more, pair[0].stride(), pair[1].stride()),
        (scan.directions, int(scan.reverse), block),
    )


def _pack_coefficients(scan: Scan, config: Config) -> Tuple[Tensor, Tensor]:
    """B and C as the kernels load them, in bf16 if they are bf16 and else in fp32."""
    _, _, length, dstate = scan.sizes
    packed = tuple(
        tensor.new_empty(
            (*tensor.shape[:2], cdiv(length, PACKED), _padded(config, dstate), PACKED),
            dtype=torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32,
        )
        for tensor in (scan.B, scan.C)
    )
    _move_coefficients(_pack, scan, (scan.B, scan.C, *packed), (scan.B, scan.C), (), config)
    return packed


def _summarise(
    scan: Scan,
    x: Tensor,
    z: Optional[Tensor],
    coefficients: Tensor,
    initial: Optional[Tensor],
    states: Tensor,
    chunk_states: int,
    cut: Cut,
    config: Config,
) -> None:
    """Fills the first state of each chunk but the first with what arrives there.

    Args:
        x: u; or the gradient of y, and the walk is the adjoint one.
        z: Gate of x.
        coefficients: B, or C for the adjoint walk, packed.
        initial: What the first chunk starts from.
        states: [entries, num_states, N, dim].
        chunk_states: States of a chunk.
    """
    _, dim, length, dstate = scan.sizes
    subchunks = (cut.chunks - 1) * cut.subchunks
    ends = states.new_empty(scan.entries, subchunks, dstate, dim)
    totals = states.new_empty(scan.entries, subchunks, dim)
    sequences = x, z, scan.delta
    _launch_scan(
        _summary,
        (scan.entries * cdiv(dim, config.block_d), subchunks),
        (x, z, scan.delta, scan.A, coefficients, scan.delta_bias, ends, totals),
        (length, dim, dstate, dim // scan.groups, cut.chunk_tiles // cut.subchunks),
        sequences,
        (x is not scan.u, config.tile(PACKED, dstate), _flags_of(scan, sequences)),
        config,
    )
    most, block_d = _COMBINE_BLOCK
    _combine(
        (cdiv(dstate * dim, block_d), scan.entries),
        (scan.A, initial, ends, totals, states),
        (dim, dstate, subchunks, cut.subchunks, states.shape[1], chunk_states),
        (scan.directions, min(most, next_power_of_2(subchunks)), block_d),
    )
