"""How the SSD's kernels divide their work: into chunks, heads and segments of chunks."""

from functools import lru_cache
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._launch import (
    MAX_PLANS,
    Launch,
    cdiv,
    dot_precision,
    is_nvidia,
    next_power_of_2,
    num_processors,
    product_block,
    shared_memory,
)
from .backward import input_gradient_kernel, projection_gradient_kernel
from .forward import output_kernel, state_kernel, step_kernel

MAX_DIM, MAX_STATES = 128, 128  # of a head
_STEP_HEADS = 16  # of a program that computes step sizes
_MAX_SEGMENTS = 64  # the states of those before are composed one by one


class Run(NamedTuple):
    """Warps of a program, stages of its loop, and most registers of a thread, on NVIDIA GPUs.

    Without stages ptxas 12.8 (Triton 3.6) gives wrong addresses to products of bf16 with few channels. So a loop over
    the heads of a group must stay a loop where there is one: their number is not specialised.
    """

    warps: int = 4
    stages: int = 1
    registers: Optional[int] = None


class Config(NamedTuple):
    """Sizes of tiles, and how often they are cut.

    Args:
        chunk: Steps of a chunk.
        state_p, state_n: Block of a head's state that a program of the walk has.
        walk, output, inputs, projections: How the kernels run: that of the states, that of y, that of the gradients of
            x, z and dt, and that of the gradients of B and C. ptxas 12.8 compiles `output_kernel` wrongly with one
            stage and less than 64 channels on sm_90.
        programs: Programs of a pass for each multiprocessor, for which heads are split and sequences cut.
        min_chunks: Fewest chunks of a segment.
        segments, splits: Fixed numbers, for tests; 0 to choose.
    """

    chunk: int = 64
    state_p: int = 64
    state_n: int = 64
    walk: Run = Run(stages=3)
    output: Run = Run(stages=3)
    inputs: Run = Run(stages=2, registers=255)  # without the number ptxas takes far fewer for large tiles
    projections: Run = Run(stages=2, registers=255)
    programs: int = 3
    min_chunks: int = 4
    segments: int = 0
    splits: int = 0

    def slots(self, processors: int) -> int:
        """Programs that a pass should have."""
        return processors * self.programs

    def fit(self, dim: int, dstate: int, itemsize: int, shared: int) -> 'Config':
        """With a chunk and stages for which a program's tiles fit into so many bytes of shared memory, and as many
        warps as the gradients of a large state need."""
        block_p, block_n = product_block(dim), product_block(dstate)

        def needed(chunk: int, stages: int, sequences: int = 2, pairs: int = 0) -> int:
            tiles = 2 * chunk * block_n + stages * (sequences * chunk * block_p + block_p * block_n) + pairs
            return tiles * itemsize + (stages - 1) * 1024  # and step sizes

        def fitting(run: Run, *more: int) -> Run:
            stages = range(run.stages, 1, -1)
            return run._replace(stages=next((n for n in stages if needed(chunk, n, *more) <= shared), 1))

        chunk = self.chunk
        while chunk > 16 and needed(chunk, 1) > shared:
            chunk //= 2
        runs: Dict[str, Any] = {name: fitting(getattr(self, name)) for name in ('walk', 'output', 'projections')}
        runs['inputs'] = fitting(self.inputs, 3, chunk * chunk)
        if block_p * block_n > 2**13:
            runs.update({name: runs[name]._replace(warps=8) for name in ('inputs', 'projections')})
        return self._replace(chunk=chunk, **runs)


CONFIG = Config()


class Tile(NamedTuple):
    """Constants of the kernels: steps of a chunk, and channels and states of a block and in all."""

    block_l: int
    block_p: int
    block_n: int
    dim: int
    dstate: int


class Flags(NamedTuple):
    """Constants of the kernels."""

    softplus: bool
    reverse: bool
    wide: bool
    half: bool
    precision: str
    nvidia: bool
    dt_min: float
    dt_max: float


class Scan(NamedTuple):
    """The arguments of a scan; all but x, dt, B, C and z are contiguous."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Optional[Tensor]
    z: Optional[Tensor]
    dt_bias: Optional[Tensor]
    initial_states: Optional[Tensor]
    sequence: Optional[Tensor]
    dt_softplus: bool
    dt_min: float
    dt_max: float
    reverse: bool

    @property
    def D_stride(self) -> int:
        """Numbers of D of a head."""
        return 0 if self.D is None else self.D.numel() // self.D.shape[0]


class Gradients(NamedTuple):
    """Gradients of tensors; those of B and C as [splits, batch, L, G, N], those of A, dt_bias and D as partial sums
    [batch * chunks, H, 2 + numbers of D]."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    z: Optional[Tensor]
    initial_states: Tensor
    parts: Tensor


class _Sizes(NamedTuple):
    """What decides how a scan is cut."""

    batch: int
    length: int
    heads: int
    groups: int
    dim: int
    dstate: int
    processors: int

    @property
    def share(self) -> int:
        return self.heads // self.groups

    @classmethod
    def of(cls, scan: Scan) -> '_Sizes':
        (batch, length, heads, dim), (*_, groups, dstate) = scan.x.shape, scan.B.shape
        return cls(batch, length, heads, groups, dim, dstate, num_processors(scan.x))


def config_of(x: Tensor, B: Tensor) -> Config:
    """How scans of such tensors are cut."""
    itemsize = 2 if x.dtype == torch.bfloat16 else 4  # as tensor cores take it
    dim, dstate = int(x.shape[-1]), int(B.shape[-1])  # also of shapes that are traced as symbols
    return _fitting(CONFIG, dim, dstate, itemsize, shared_memory(x))


@lru_cache(maxsize=MAX_PLANS)
def _fitting(config: Config, dim: int, dstate: int, itemsize: int, shared: int) -> Config:
    return config.fit(dim, dstate, itemsize, shared)


def steps_shape(x: Tensor, B: Tensor) -> Tuple[int, ...]:
    """Of the step sizes and the sums of their exponents inside of chunks."""
    (batch, length, heads, _), chunk = x.shape, config_of(x, B).chunk
    return batch, heads, cdiv(length, chunk), 2, chunk


def states_shape(x: Tensor, B: Tensor) -> Tuple[int, ...]:
    """Of the states before each chunk, which the backward pass starts from: [batch, chunks, H, P, N]."""
    batch, length, heads, dim = x.shape
    return batch, cdiv(length, config_of(x, B).chunk), heads, dim, B.shape[-1]


def states_dtype(x: Tensor) -> torch.dtype:
    """As tensor cores take them; what is passed from chunk to chunk is fp32."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def scan_forward(scan: Scan, y: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Fills y; returns the last state, the steps, and the states before each chunk."""
    sizes, config, flags = _Sizes.of(scan), config_of(scan.x, scan.B), _flags(scan)
    steps = scan.x.new_empty(steps_shape(scan.x, scan.B), dtype=torch.float32)
    _step_launch(sizes, _strides(scan.dt), flags, config)(scan.dt, scan.A, scan.dt_bias, steps)
    states, last = _walk(scan, scan.x, None, scan.B, steps, scan.initial_states)
    strides = _strides(scan.x, scan.B, scan.C, scan.z, y)
    launch = _chunk_launch(output_kernel, sizes, strides, (scan.D_stride,), flags, config)
    launch(scan.x, scan.B, scan.C, scan.D, scan.z, steps, scan.sequence, states, y)
    return last, steps, states


def scan_backward(scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], steps: Tensor, states: Tensor) -> Gradients:
    """Gradients of all tensors."""
    x, z, B = scan.x, scan.z, scan.B
    adjoints, grad_initial = _walk(scan, grad_y, z, scan.C, steps, grad_last)
    sizes, config, flags = _Sizes.of(scan), config_of(x, B), _flags(scan)
    splits, _ = _splits(sizes, config)
    grad_x, grad_z = torch.empty_like(x), None if z is None else torch.empty_like(z)
    grad_dt = torch.empty_like(scan.dt, memory_format=torch.contiguous_format)
    shape = splits, *B.shape
    dtypes = (B.dtype, scan.C.dtype) if splits == 1 else (torch.float32, torch.float32)
    grad_B, grad_C = (B.new_empty(shape, dtype=dtype) for dtype in dtypes)
    parts = x.new_empty((*states.shape[:3], 2 + scan.D_stride), dtype=torch.float32)
    strides = _strides(grad_y, x, scan.dt, B, scan.C, z, grad_x, grad_z)
    launch = _chunk_launch(input_gradient_kernel, sizes, strides, (scan.D_stride,), flags, config)
    inputs = x, scan.dt, scan.A, B, scan.C, scan.D, z, scan.dt_bias, steps, scan.sequence
    launch(grad_y, *inputs, states, adjoints, grad_x, grad_dt, grad_z, parts)
    launch = _chunk_launch(projection_gradient_kernel, sizes, _strides(grad_y, x, B, scan.C, z), (), flags, config)
    launch(grad_y, x, B, scan.C, z, steps, scan.sequence, states, adjoints, grad_B, grad_C)
    return Gradients(grad_x, grad_dt, grad_B, grad_C, grad_z, grad_initial, parts.flatten(0, 1))


def _walk(
    scan: Scan, x: Tensor, z: Optional[Tensor], B: Tensor, steps: Tensor, initial: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    """States before each chunk and the last one; adjoint ones if x is not scan.x."""
    sizes = _Sizes.of(scan)
    strides = _strides(x, z, B)
    config = config_of(scan.x, scan.B)
    walk, summary, segments = _walk_launches(sizes, strides, x is not scan.x, _flags(scan), config)
    states = x.new_empty(states_shape(scan.x, scan.B), dtype=states_dtype(scan.x))
    shape = sizes.batch, sizes.heads, sizes.dim, sizes.dstate
    last = x.new_empty(shape, dtype=torch.float32)
    ends = last.new_empty((*shape[:2], segments - 1, *shape[2:]))
    totals = last.new_empty((*shape[:2], segments - 1))
    inputs = x, z, B, steps, scan.sequence
    if summary is not None:
        summary(*inputs, None, ends, totals, None, None)
    walk(*inputs, initial, ends, totals, states, last)
    return states, last


@lru_cache(maxsize=MAX_PLANS)
def _step_launch(sizes: _Sizes, strides: Tuple[Tuple[int, ...], ...], flags: Flags, config: Config) -> Launch:
    block_h = min(next_power_of_2(sizes.heads), _STEP_HEADS)
    tile, flags = Tile(config.chunk, 1, 1, 1, 1), _widened(flags, strides, config)
    grid = sizes.batch * cdiv(sizes.heads, block_h), cdiv(sizes.length, config.chunk)
    return Launch(step_kernel, grid, (sizes.length, sizes.heads, *strides), (block_h, tile, flags))


@lru_cache(maxsize=MAX_PLANS)
def _walk_launches(
    sizes: _Sizes, strides: Tuple[Tuple[int, ...], ...], adjoint: bool, flags: Flags, config: Config
) -> Tuple[Launch, Optional[Launch], int]:
    """The walk, the walk before it that finds the states between segments, and the number of segments."""
    block_p, block_n = (
        min(block, product_block(size)) for block, size in ((config.state_p, sizes.dim), (config.state_n, sizes.dstate))
    )
    tile, flags = Tile(config.chunk, block_p, block_n, sizes.dim, sizes.dstate), _widened(flags, strides, config)
    programs = sizes.batch * sizes.heads * cdiv(sizes.dim, block_p) * cdiv(sizes.dstate, block_n)
    chunks = cdiv(sizes.length, config.chunk)
    most = config.slots(sizes.processors) // max(programs, 1)
    segments = config.segments or min(most, chunks // config.min_chunks, _MAX_SEGMENTS)
    segment_chunks = cdiv(chunks, max(1, min(segments, chunks)))
    segments = cdiv(chunks, segment_chunks)
    integers = sizes.length, sizes.heads, sizes.share, segment_chunks, *strides

    def launch(segments: int, is_summary: bool) -> Launch:
        constants = adjoint, is_summary, tile, flags
        return _launch(state_kernel, (programs, segments), integers, constants, config.walk)

    return launch(segments, False), launch(segments - 1, True) if segments > 1 else None, segments


@lru_cache(maxsize=MAX_PLANS)
def _chunk_launch(
    kernel: Any,
    sizes: _Sizes,
    strides: Tuple[Tuple[int, ...], ...],
    constants: Tuple[int, ...],
    flags: Flags,
    config: Config,
) -> Launch:
    """Of a kernel whose programs have a chunk of some heads of a group."""
    splits, split_heads = _splits(sizes, config)
    block_p, block_n = product_block(sizes.dim), product_block(sizes.dstate)
    tile, flags = Tile(config.chunk, block_p, block_n, sizes.dim, sizes.dstate), _widened(flags, strides, config)
    grid = sizes.batch * sizes.groups * splits, cdiv(sizes.length, config.chunk)
    integers = sizes.share, (sizes.length, sizes.heads, split_heads), *strides
    runs = {output_kernel: config.output, input_gradient_kernel: config.inputs}
    return _launch(kernel, grid, integers, (*constants, tile, flags), runs.get(kernel, config.projections))


def _launch(kernel: Any, grid: Tuple[int, int], integers: tuple, constants: tuple, run: Run) -> Launch:
    """`constants` end with flags."""
    registers = run.registers if constants[-1].nvidia else None
    return Launch(kernel, grid, integers, constants, run.warps, registers, run.stages)


def _splits(sizes: _Sizes, config: Config) -> Tuple[int, int]:
    """Among how many programs the heads of a group are shared, and heads of each: as few as fill the processors."""
    programs = sizes.batch * sizes.groups * cdiv(sizes.length, config.chunk)
    splits = config.splits or cdiv(config.slots(sizes.processors), max(programs, 1))
    split_heads = cdiv(sizes.share, min(splits, sizes.share))
    return cdiv(sizes.share, split_heads), split_heads


def _flags(scan: Scan) -> Flags:
    x = scan.x
    half = x.dtype == torch.bfloat16
    limits = scan.dt_min, scan.dt_max
    return Flags(scan.dt_softplus, scan.reverse, False, half, dot_precision(x), is_nvidia(x), *limits)


def _widened(flags: Flags, strides: Tuple[Tuple[int, ...], ...], config: Config) -> Flags:
    """With 64 bits for offsets inside a chunk where its steps are that far apart."""
    most = max(config.chunk * step + max(MAX_DIM, MAX_STATES) * column for _, step, _, column in strides)
    return flags._replace(wide=most >= 2**31)


def _strides(*tensors: Optional[Tensor]) -> Tuple[Tuple[int, ...], ...]:
    """Of each tensor, those of batch, step, head and column; 0 for what it lacks."""
    return tuple([(0, 0, 0, 0) if tensor is None else (*tensor.stride(), 0)[:4] for tensor in tensors])
