"""Launches of the selective scan's kernels: how they cut their work, by the sizes of the scan and the GPU."""

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._launch import MAX_PLANS, Launch, cdiv, is_nvidia, next_power_of_2, num_processors
from .backward import scan_backward_kernel
from .forward import combine_kernel, scan_kernel, summary_kernel
from .layout import pack_kernel, unpack_kernel
from .tiles import PACKED as _PACKED

PACKED = getattr(_PACKED, 'value', _PACKED)  # steps between saved states
MAX_STATES = 64
_THREAD_STATES = 4  # that a thread takes, at most
_COMBINE_BLOCK = 64, 32  # subchunks, and pairs of a state and a channel


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
    reverse: int  # compiled as 0 or 1
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
        """Registers per thread: the 65536 of a multiprocessor, shared among its programs, in multiples of 8.

        Registers hold data that is loaded early; fewer registers with more warps were slower.
        """
        return min(65536 // (32 * self.num_warps * self.programs_per_processor) // 8 * 8, 255)

    def tile(self, steps: int, dstate: int) -> Tile:
        return Tile(steps, self.warps, self.block_d, cdiv(dstate, self.warps))

    def slots(self, processors: int) -> int:
        """Programs that run at the same time."""
        return processors * self.programs_per_processor


CONFIG = Config()


class Cut(NamedTuple):
    """How L is cut: `chunks` of `chunk_tiles` tiles are walked in parallel, of which the last may have fewer; the pass
    before, which finds the state at the end of each chunk, walks `subchunks` of each in parallel."""

    chunks: int
    chunk_tiles: int
    subchunks: int


class Scan(NamedTuple):
    """The tensors of a scan as the kernels take them.

    Sequences are [batch, dim, L], B and C [batch, groups, N, L]. Where two directions are walked at once (the second
    one against the sequence), sequences are [batch, 2, dim, L], B and C [batch, 2, N, L], and parameters have a first
    dimension of 2. All but sequences, B and C are contiguous; A is fp32."""

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


class Targets(NamedTuple):
    """Where gradients are written: those of u, delta and z with the same strides."""

    u: Tensor
    delta: Tensor
    z: Optional[Tensor]
    B: Tensor
    C: Tensor


class _Sizes(NamedTuple):
    """What decides how a scan is cut."""

    batch: int
    directions: int
    groups: int
    dim: int
    length: int
    dstate: int
    softplus: bool
    reverse: bool
    exact: bool
    nvidia: bool
    processors: int

    @property
    def entries(self) -> int:
        """Directions of elements of the batch."""
        return self.batch * self.directions

    @property
    def tiles(self) -> int:
        return cdiv(self.length, PACKED)

    def flags(self, strides: Tuple[Tuple[int, ...], ...]) -> Flags:
        """Of a kernel that walks sequences with these strides; all 0 for an absent one."""
        last = all(s[2] == 1 for s in strides if any(s)) and strides[0][3] != 1
        return Flags(self.softplus, self.directions, int(self.reverse), last, self.exact, self.nvidia)

    @classmethod
    def of(cls, scan: Scan) -> '_Sizes':
        u = scan.u
        *_, dim, length = u.shape
        directions = u.shape[1] if u.ndim == 4 else 1
        groups = 1 if directions > 1 else scan.B.shape[1]
        numerics = u.dtype != torch.bfloat16, is_nvidia(u), num_processors(u)
        sizes = u.shape[0], directions, groups, dim, length, scan.A.shape[-1]
        return cls(*sizes, scan.softplus, scan.reverse, *numerics)


def states_shape(u: Tensor, A: Tensor) -> Tuple[int, ...]:
    """What `scan_forward` saves: states before each PACKED steps and after the last, [batch, tiles + 1, N, dim]."""
    return u.shape[0], cdiv(u.shape[2], PACKED) + 1, A.shape[1], A.shape[0]


def scan_forward(scan: Scan, y: Tensor, save: bool) -> Tuple[Tensor, Tensor]:
    """Fills y; returns the last state [entries, dim, N] and, with `save`, the states before each tile and after the
    last, [entries, tiles + 1, N, dim]; entries are directions of elements of the batch."""
    sizes = _Sizes.of(scan)
    strides = _strides_of(scan.u), _strides_of(scan.delta), _strides_of(scan.z), _strides_of(y)
    launch, cut, num_states, chunk_states = _forward_launch(sizes, strides, save, CONFIG)
    states = scan.A.new_empty((sizes.entries, num_states, sizes.dstate, sizes.dim))
    last = scan.A.new_empty((sizes.entries, sizes.dim, sizes.dstate))
    B, C = _pack_coefficients(scan, sizes)
    if cut.chunks > 1:
        _summarise(scan, sizes, scan.u, None, B, scan.initial, states, chunk_states, cut)
    launch(scan.u, scan.delta, scan.A, B, C, scan.D, scan.z, scan.delta_bias, scan.initial, y, last, states)
    return last, states


def empty_targets(scan: Scan) -> Targets:
    """New tensors, laid out like the sequences."""
    batch, dim, length = scan.u.shape
    strides = [_strides_of(sequence) for sequence in (scan.u, scan.delta, scan.z)]
    last = _Sizes.of(scan).flags(tuple(strides)).channels_last

    def sequence(dtype: torch.dtype) -> Tensor:
        grad = scan.u.new_empty((batch, length, dim) if last else (batch, dim, length), dtype=dtype)
        return grad.transpose(1, 2) if last else grad

    z = None if scan.z is None else sequence(scan.z.dtype)
    coefficients = (tensor.new_empty(tensor.shape) for tensor in (scan.B, scan.C))
    return Targets(sequence(scan.u.dtype), sequence(scan.delta.dtype), z, *coefficients)


class ScanGradients(NamedTuple):
    """Adjoint states of the chunks [entries, chunks, N, dim], the last of which is the gradient of the initial state;
    and partial sums [parts, directions * dim * (2 + N)] of the gradients of D, delta_bias and A of all directions."""

    adjoints: Tensor
    parameters: Tensor


def scan_backward(
    scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, targets: Targets, log_A: bool = False
) -> ScanGradients:
    """Gradients of all tensors, those of `targets` written there; with `log_A` that of log(-A) in place of A's."""
    sizes = _Sizes.of(scan)
    sequences = grad_y, scan.u, scan.delta, scan.z, targets.u
    strides = tuple([_strides_of(sequence) for sequence in sequences])
    launch, cut, splits = _backward_launch(sizes, strides, log_A, CONFIG)
    B, C = _pack_coefficients(scan, sizes)
    adjoints = scan.A.new_empty((sizes.entries, cut.chunks, sizes.dstate, sizes.dim))
    if cut.chunks > 1:
        _summarise(scan, sizes, grad_y, scan.z, C, grad_last, adjoints, 1, cut)
    sums = scan.A.new_empty((sizes.batch * cut.chunks, sizes.directions * sizes.dim * (2 + sizes.dstate)))
    grad_BC = scan.A.new_empty((splits, *B.shape[:-1], 2, PACKED))
    inputs = grad_y, grad_last, scan.u, scan.delta, scan.A, B, C, scan.D, scan.z, scan.delta_bias, states
    launch(*inputs, adjoints, sums, targets.u, targets.delta, targets.z, grad_BC)
    _unpack_launch(sizes, targets.B.stride(), targets.C.stride(), splits, CONFIG)(grad_BC, targets.B, targets.C)
    return ScanGradients(adjoints, sums)


@lru_cache(maxsize=MAX_PLANS)
def _forward_launch(
    sizes: _Sizes, strides: Tuple[Tuple[int, ...], ...], save: bool, config: Config
) -> Tuple[Launch, Cut, int, int]:
    """The launch, how L is cut, the number of states, and that of each chunk."""
    config = config.fit(sizes.dstate)
    programs = sizes.entries * cdiv(sizes.dim, config.block_d)
    cut = _cut(config, sizes, programs, programs)
    num_states, chunk_states = (sizes.tiles + 1, cut.chunk_tiles) if save else (cut.chunks, 1)
    integers = sizes.length, sizes.dim, sizes.dstate, sizes.dim // sizes.groups, cut.chunk_tiles
    launch = _walk_launch(
        scan_kernel,
        (programs, cut.chunks),
        (*integers, chunk_states, num_states, *strides),
        (cut.chunks > 1, save, config.tile(PACKED, sizes.dstate), sizes.flags(strides)),
        config,
    )
    return launch, cut, num_states, chunk_states


@lru_cache(maxsize=MAX_PLANS)
def _backward_launch(
    sizes: _Sizes, strides: Tuple[Tuple[int, ...], ...], log_A: bool, config: Config
) -> Tuple[Launch, Cut, int]:
    """The launch, how L is cut, and among how many programs the channels of a group are shared."""
    config = config.fit(sizes.dstate)
    group_dim = sizes.dim // sizes.groups
    blocks = cdiv(group_dim, config.block_d)
    rows = sizes.entries * sizes.groups
    splits = min(blocks, config.splits or _splits(rows, blocks, config.slots(sizes.processors)))
    split_blocks = cdiv(blocks, splits)
    splits = cdiv(blocks, split_blocks)
    cut = _cut(config, sizes, rows * splits, sizes.entries * cdiv(sizes.dim, config.block_d))
    integers = sizes.length, sizes.dim, sizes.dstate, group_dim, splits, split_blocks, sizes.tiles + 1, cut.chunk_tiles
    launch = _walk_launch(
        scan_backward_kernel,
        (rows * splits, cut.chunks),
        (*integers, sum(strides, ())),
        (cut.chunks > 1, log_A, config.tile(PACKED // 2, sizes.dstate), sizes.flags(strides)),
        config,
    )
    return launch, cut, splits


@lru_cache(maxsize=MAX_PLANS)
def _summary_launches(
    sizes: _Sizes,
    strides: Tuple[Tuple[int, ...], ...],
    cut: Cut,
    num_states: int,
    chunk_states: int,
    adjoint: bool,
    config: Config,
) -> Tuple[Launch, Launch]:
    config = config.fit(sizes.dstate)
    subchunks = (cut.chunks - 1) * cut.subchunks
    integers = sizes.length, sizes.dim, sizes.dstate, sizes.dim // sizes.groups, cut.chunk_tiles // cut.subchunks
    summary = _walk_launch(
        summary_kernel,
        (sizes.entries * cdiv(sizes.dim, config.block_d), subchunks),
        (*integers, *strides),
        (adjoint, config.tile(PACKED, sizes.dstate), sizes.flags(strides)),
        config,
    )
    most, block_d = _COMBINE_BLOCK
    combine = Launch(
        combine_kernel,
        (cdiv(sizes.dstate * sizes.dim, block_d), sizes.entries),
        (sizes.dim, sizes.dstate, subchunks, cut.subchunks, num_states, chunk_states),
        (sizes.directions, min(most, next_power_of_2(subchunks)), block_d),
    )
    return summary, combine


@lru_cache(maxsize=MAX_PLANS)
def _pack_launch(
    sizes: _Sizes, B_strides: Tuple[int, ...], C_strides: Tuple[int, ...], config: Config
) -> Tuple[Launch, Tuple[int, ...]]:
    """The launch that packs B and C [batch, groups, N, L] with these strides, and the shape of either."""
    padded, groups = _padded(sizes, config), max(sizes.groups, sizes.directions)
    launch = _move_launch(pack_kernel, sizes, padded, groups, (), B_strides, C_strides)
    return launch, (sizes.batch, groups, sizes.tiles, padded, PACKED)


@lru_cache(maxsize=MAX_PLANS)
def _unpack_launch(
    sizes: _Sizes, B_strides: Tuple[int, ...], C_strides: Tuple[int, ...], splits: int, config: Config
) -> Launch:
    padded, groups = _padded(sizes, config), max(sizes.groups, sizes.directions)
    return _move_launch(unpack_kernel, sizes, padded, groups, (splits,), B_strides, C_strides)


def _move_launch(
    kernel: Any,
    sizes: _Sizes,
    padded: int,
    groups: int,
    more: Tuple[int, ...],
    B_strides: Tuple[int, ...],
    C_strides: Tuple[int, ...],
) -> Launch:
    block = MoveBlock(PACKED, 4, min(16, next_power_of_2(padded)))
    return Launch(
        kernel,
        2 * sizes.batch * groups * cdiv(padded, block.block_n) * cdiv(sizes.tiles, block.tiles),
        (sizes.length, sizes.dstate, padded, sizes.batch * groups, groups, *more, B_strides, C_strides),
        (sizes.directions, int(sizes.reverse), block),
    )


def _walk_launch(kernel: Any, grid: Tuple[int, int], sizes: tuple, constants: tuple, config: Config) -> Launch:
    registers = config.registers if constants[-1].nvidia else None
    return Launch(kernel, grid, sizes, constants, config.num_warps, registers, stages=1)


def _cut(config: Config, sizes: _Sizes, programs: int, summary_programs: int) -> Cut:
    """As few chunks, of as few subchunks, as fill the processors.

    Args:
        programs: Programs of a chunk.
        summary_programs: Programs of a chunk in the pass before.
    """
    slots, tiles = config.slots(sizes.processors), sizes.tiles
    chunks = config.chunks or min(slots // programs, tiles // config.min_tiles)
    chunks = max(1, min(chunks, tiles))
    chunk_tiles = cdiv(tiles, chunks)
    subchunks = 1
    if chunks > 1:
        most = slots // (summary_programs * (chunks - 1))
        subchunks = config.subchunks or min(most, chunk_tiles // config.min_tiles)
        subchunks = max(1, min(subchunks, chunk_tiles))
        chunk_tiles = cdiv(chunk_tiles, subchunks) * subchunks
    return Cut(cdiv(tiles, chunk_tiles), chunk_tiles, subchunks)


def _splits(rows: int, blocks: int, slots: int) -> int:
    """Among how many programs the `blocks` of each of `rows` are dealt: the fewest with which all finish first."""

    def time(splits: int) -> int:
        return cdiv(rows * splits, slots) * cdiv(blocks, splits)

    return min(range(1, blocks + 1), key=time)


def _padded(sizes: _Sizes, config: Config) -> int:
    """States that packed B and C have room for."""
    warps = config.fit(sizes.dstate).warps
    return cdiv(sizes.dstate, warps) * warps


def _strides_of(tensor: Optional[Tensor]) -> Tuple[int, ...]:
    """Strides of [batch, 2, dim, L], or of [batch, dim, L] with 0 for the direction; all 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    return strides if len(strides) == 4 else (strides[0], 0, *strides[1:])


def _pack_coefficients(scan: Scan, sizes: _Sizes) -> Tuple[Tensor, Tensor]:
    """B and C as the kernels load them, in bf16 if they are bf16 and else in fp32."""
    launch, shape = _pack_launch(sizes, scan.B.stride(), scan.C.stride(), CONFIG)
    B, C = scan.A.new_empty(shape, dtype=_packed_dtype(scan.B)), scan.A.new_empty(shape, dtype=_packed_dtype(scan.C))
    launch(scan.B, scan.C, B, C)
    return B, C


def _packed_dtype(coefficients: Tensor) -> torch.dtype:
    return torch.bfloat16 if coefficients.dtype == torch.bfloat16 else torch.float32


def _summarise(
    scan: Scan,
    sizes: _Sizes,
    x: Tensor,
    z: Optional[Tensor],
    coefficients: Tensor,
    initial: Optional[Tensor],
    states: Tensor,
    chunk_states: int,
    cut: Cut,
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
    strides = _strides_of(x), _strides_of(z), _strides_of(scan.delta)
    summary, combine = _summary_launches(sizes, strides, cut, states.shape[1], chunk_states, x is not scan.u, CONFIG)
    subchunks = (cut.chunks - 1) * cut.subchunks
    ends = states.new_empty((sizes.entries, subchunks, sizes.dstate, sizes.dim))
    totals = states.new_empty((sizes.entries, subchunks, sizes.dim))
    summary(x, z, scan.delta, scan.A, coefficients, scan.delta_bias, ends, totals)
    combine(scan.A, initial, ends, totals, states)
