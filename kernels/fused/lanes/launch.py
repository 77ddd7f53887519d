"""Launches of the selective scan's Triton kernels: how the work is cut, strides, and what is summed afterwards."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ...backend import processors_of
from ..arithmetic import parts, power_of_2
from ..launcher import Launcher
from ..sequences import Gradients, Scan, prepare, unit_stride
from .backward import scan_backward_kernel
from .forward import scan_combine_kernel, scan_forward_kernel, scan_summary_kernel

_forward = Launcher(scan_forward_kernel)
_summary = Launcher(scan_summary_kernel)
_combine = Launcher(scan_combine_kernel)
_backward = Launcher(scan_backward_kernel)

ELEMENTS = 8  # neighbouring positions in the registers of a thread
_ALIGNMENT = 16  # Triton knows of sizes and strides that they are multiples of this
_BACKWARD_SLOTS = 5  # see `scan_backward_kernel`


class ScanConfig(NamedTuple):
    """How a pass cuts its work.

    A tile of one program is `rows` channels by `8 * lanes` positions. `chunks` pieces of L are walked in parallel; the
    blocks of `rows` channels of a group are dealt to `splits` programs (backward only). Zero chooses by the sizes.
    """

    rows: int = 16
    lanes: int = 8
    warps: int = 4
    chunks: int = 0
    splits: int = 0
    warps_per_processor: int = 16  # enough to keep a multiprocessor busy
    min_tiles: int = 4  # a chunk has no fewer


def fit(config: ScanConfig, group_dim: int) -> ScanConfig:
    """The config with no more rows than a group has; where those are few, a warp shares one or two channels.

    Coefficients of B and C are loaded in place only while a tile has fewer positions than a program has threads, or
    exactly 8 for each; fewer warps for fewer rows would not do.
    """
    rows = min(config.rows, power_of_2(group_dim))
    if rows < min(config.rows, 8) and config.warps > 1:
        return config._replace(rows=min(rows, 2), lanes=32, warps=1)
    return config._replace(rows=rows)


def _chunk_tiles(config: ScanConfig, tiles: int, programs: int, tensor: Tensor) -> int:
    """Tiles per chunk of L: as few chunks as fill the processors."""
    chunks = config.chunks
    if chunks == 0:
        wanted = processors_of(tensor) * config.warps_per_processor
        chunks = min(parts(wanted, programs * config.warps), tiles // config.min_tiles)
    return parts(tiles, max(1, min(chunks, tiles)))


def _coefficients(tensor: Tensor) -> Tensor:
    """B or C with rows that can be loaded in whole vectors; copied and padded where they cannot (they are small)."""
    if tensor.ndim == 2:
        return tensor.contiguous()
    if _is_direct(tensor):
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:-1], _padded(tensor.shape[-1]))
    padded[..., : tensor.shape[-1]] = tensor
    return padded


def _padded(length: int) -> int:
    return parts(length, _ALIGNMENT) * _ALIGNMENT


def _is_direct(tensor: Tensor) -> bool:
    """Whether each row starts and ends at a multiple of 16 elements."""
    sizes = (tensor.shape[-1], *(s for n, s in zip(tensor.shape[:-1], tensor.stride()) if n > 1))
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(s % _ALIGNMENT == 0 for s in sizes)


def _all_direct(*sequences: Optional[Tensor]) -> bool:
    """Whether tiles of all sequences can be loaded in vectors of 8 elements."""
    return all(s.element_size() == 2 and _is_direct(s) for s in sequences if s is not None)


def forward(scan: Scan, y: Tensor, save: bool, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and the states between tiles, [batch, dim, N, tiles + 1] if they are saved."""
    batch, dim, length = scan.u.shape
    dstate = scan.A.shape[1]
    blocks = parts(scan.group_dim, config.rows)
    programs = batch * scan.groups * blocks
    tiles = parts(length, config.lanes * ELEMENTS)
    chunk_tiles = _chunk_tiles(config, tiles, programs, scan.u)
    chunks = parts(tiles, chunk_tiles)
    chunk_slots, slots = (chunk_tiles, tiles + 1) if save else (2, 2 * chunks)
    states = scan.u.new_empty(batch, dim, dstate, slots, dtype=torch.float32)
    if chunks > 1:
        _carries(scan, states, chunk_tiles, chunk_slots, config)
    _forward(
        (programs, chunks),
        (
            scan.u,
            scan.delta,
            scan.A,
            scan.B,
            scan.C,
            scan.D,
            scan.z if scan.z is not None else scan.u,
            scan.delta_bias,
            scan.initial,
            y,
            states,
        ),
        (
            length,
            _padded(length),
            dim,
            dstate,
            scan.group_dim,
            blocks,
            scan.share,
            scan.group_share('B'),
            scan.group_share('C'),
            chunk_tiles,
            slots,
            chunk_slots,
            *scan.strides('u'),
            *scan.strides('delta'),
            *scan.strides('z'),
            *y.stride()[:-1],
            *scan.strides('B'),
            *scan.strides('C'),
            1,
        ),
        (
            scan.D is not None,
            scan.z is not None,
            scan.delta_bias is not None,
            scan.initial is not None,
            scan.softplus,
            scan.B.ndim == 2,
            scan.C.ndim == 2,
            scan.reverse,
            save,
            _all_direct(scan.u, scan.delta, scan.z),
            config.rows,
            config.lanes,
            ELEMENTS,
        ),
        warps=config.warps,
    )
    last_tiles = tiles - (chunks - 1) * chunk_tiles
    last_slot = tiles if save else (chunks - 1) * 2 + last_tiles % 2
    return states[..., last_slot].clone(memory_format=torch.contiguous_format), states


def _carries(
    scan: Scan,
    states: Tensor,
    chunk_tiles: int,
    chunk_slots: int,
    config: ScanConfig,
    grad_y: Optional[Tensor] = None,
    grad_last: Optional[Tensor] = None,
) -> None:
    """Fills the first slot of each chunk with the carry into it; given grad_y, with that of the adjoint walk."""
    adjoint = grad_y is not None
    x, initial = (grad_y, grad_last) if adjoint else (scan.u, scan.initial)
    z, name = (scan.z, 'C') if adjoint else (None, 'B')
    batch, dim, length = x.shape
    dstate = scan.A.shape[1]
    blocks = parts(scan.group_dim, config.rows)
    chunks = parts(parts(length, config.lanes * ELEMENTS), chunk_tiles)
    steps = states.new_empty(chunks, batch, dim)
    coefficients = getattr(scan, name)
    _summary(
        (batch * scan.groups * blocks, chunks),
        (
            x,
            z if z is not None else x,
            scan.delta,
            scan.A,
            coefficients,
            scan.delta_bias,
            states,
            steps,
        ),
        (
            length,
            _padded(length),
            dim,
            dstate,
            scan.group_dim,
            blocks,
            scan.share,
            scan.group_share(name),
            chunk_tiles,
            states.shape[-1],
            chunk_slots,
            *x.stride()[:-1],
            *((0, 0) if z is None else z.stride()[:-1]),
            *scan.strides('delta'),
            *scan.strides(name),
            1,
        ),
        (
            z is not None,
            scan.delta_bias is not None,
            scan.softplus,
            coefficients.ndim == 2,
            scan.reverse != adjoint,
            adjoint,
            _all_direct(x, scan.delta, z),
            config.rows,
            config.lanes,
            ELEMENTS,
        ),
        warps=config.warps,
    )
    rows, block = batch * dim * dstate, 128
    _combine(
        parts(rows, block),
        (
            scan.A,
            initial,
            states,
            steps,
        ),
        (
            rows,
            dim,
            dstate,
            chunks,
            states.shape[-1],
            chunk_slots,
        ),
        (
            initial is not None,
            block,
        ),
        warps=4,
    )


def backward(scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, config: ScanConfig) -> Gradients:
    batch, dim, length = scan.u.shape
    dstate, groups = scan.A.shape[1], scan.groups
    blocks = parts(scan.group_dim, config.rows)
    wanted = parts(processors_of(scan.u) * config.warps_per_processor, batch * groups * config.warps)
    split_blocks = parts(blocks, min(blocks, config.splits or max(1, wanted)))
    splits = parts(blocks, split_blocks)
    tiles = parts(length, config.lanes * ELEMENTS)
    chunk_tiles = _chunk_tiles(config, tiles, batch * groups * splits, scan.u)
    chunks = parts(tiles, chunk_tiles)
    padded = _padded(length)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scan.u.new_empty(sizes, dtype=dtype)

    def sums_over_channels(coefficients: Tensor) -> Tensor:
        return empty(*((0,) if coefficients.ndim == 2 else (splits, batch, groups, dstate, padded)))

    work = empty(batch, dim, dstate, chunks * _BACKWARD_SLOTS)
    if chunks > 1:
        _carries(scan, work, chunk_tiles, _BACKWARD_SLOTS, config, grad_y, grad_last)
    grad_u = empty(batch, dim, length, dtype=scan.u.dtype)
    grad_delta = empty(batch, dim, length, dtype=scan.delta.dtype if scan.share == 1 else torch.float32)
    grad_z = None if scan.z is None else empty(batch, dim, length, dtype=scan.z.dtype)
    grad_B, grad_C = sums_over_channels(scan.B), sums_over_channels(scan.C)
    grad_D, grad_bias = (None if t is None else empty(chunks, batch, dim) for t in (scan.D, scan.delta_bias))
    _backward(
        (batch * groups * splits, chunks),
        (
            grad_y,
            grad_last,
            scan.u,
            scan.delta,
            scan.A,
            scan.B,
            scan.C,
            scan.D,
            scan.z if scan.z is not None else scan.u,
            scan.delta_bias,
            scan.initial,
            states,
            work,
            grad_u,
            grad_delta,
            grad_z if grad_z is not None else grad_u,
            grad_B,
            grad_C,
            grad_D,
            grad_bias,
        ),
        (
            length,
            padded,
            dim,
            dstate,
            scan.group_dim,
            splits,
            split_blocks,
            scan.share,
            scan.group_share('B'),
            scan.group_share('C'),
            states.shape[-1],
            chunk_tiles,
            work.shape[-1],
            _BACKWARD_SLOTS,
            *grad_y.stride()[:-1],
            *scan.strides('u'),
            *scan.strides('delta'),
            *scan.strides('z'),
            *scan.strides('B'),
            *scan.strides('C'),
            *grad_u.stride()[:-1],
            1,
        ),
        (
            scan.D is not None,
            scan.z is not None,
            scan.delta_bias is not None,
            scan.initial is not None,
            grad_last is not None,
            scan.softplus,
            scan.B.ndim == 2,
            scan.C.ndim == 2,
            scan.reverse,
            _all_direct(grad_y, scan.u, scan.delta, scan.z),
            config.rows,
            config.lanes,
            ELEMENTS,
        ),
        warps=config.warps,
    )
    slots = work.unflatten(-1, (chunks, _BACKWARD_SLOTS))
    last_tiles = tiles - (chunks - 1) * chunk_tiles

    def coefficient_gradient(coefficients: Tensor, grad: Tensor, slot: int) -> Tensor:
        if coefficients.ndim == 2:
            return slots[..., slot].sum(dim=(0, 3))
        grad = grad[..., :length].unflatten(2, (coefficients.shape[1], -1))
        return grad.sum(dim=(0, 3))

    return Gradients(
        grad_u,
        grad_delta if scan.share == 1 else grad_delta.unflatten(1, (-1, scan.share)).sum(dim=2),
        slots[..., 2].sum(dim=(0, 3)),
        coefficient_gradient(scan.B, grad_B, 3),
        coefficient_gradient(scan.C, grad_C, 4),
        None if grad_D is None else grad_D.sum(dim=(0, 1)),
        grad_z,
        None if grad_bias is None else grad_bias.sum(dim=(0, 1)),
        slots[..., -1, last_tiles % 2],
    )


FORWARD = ScanConfig(rows=32)
BACKWARD = ScanConfig(rows=32)  # it starts from states that the forward pass saved, and so has its lanes


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    """What `run_forward` saves: the states before each tile and after the last, [batch, dim, N, tiles + 1]."""
    batch, dim, length = u.shape
    groups = max((tensor.shape[1] for tensor in (B, C) if tensor.ndim == 4), default=1)
    tile = fit(BACKWARD, dim // groups).lanes * ELEMENTS
    return batch, *A.shape, parts(length, tile) + 1


def run_forward(y: Tensor, save: bool, *arguments) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and the saved states. The arguments are those of `prepare` but the first two."""
    scan = prepare(unit_stride, _coefficients, *arguments)
    target = y if y.stride(-1) == 1 else torch.empty_like(y, memory_format=torch.contiguous_format)
    results = forward(scan, target, save, fit(FORWARD, scan.group_dim))
    if target is not y:
        y.copy_(target)
    return results


def run_backward(grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, *arguments) -> Gradients:
    scan = prepare(unit_stride, _coefficients, *arguments)
    return backward(scan, unit_stride(grad_y), grad_last, states, fit(BACKWARD, scan.group_dim))
