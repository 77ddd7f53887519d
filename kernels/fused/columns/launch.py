"""Launches of the selective scan's Triton kernels: how the work is cut, strides, and what is summed afterwards.

Importable without the package triton.
"""

from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ...backend import compiles_for_nvidia, dot_precision, processors_of
from ..sequences import Gradients, Scan, prepare, unit_stride


class ScanConfig(NamedTuple):
    """How a pass cuts its work.

    A tile of one program is `steps` positions of `columns` channels, one channel a thread. `chunks` pieces of L are
    walked in parallel; the blocks of a group's channels are dealt to `splits` programs (backward only). Zero chooses by
    the sizes.
    """

    steps: int = 16
    columns: int = 128
    chunks: int = 0
    splits: int = 0
    registers: int = 128  # of a thread
    warps_per_processor: int = 16  # enough to keep a multiprocessor busy
    min_tiles: int = 4  # a chunk has no fewer

    @property
    def warps(self) -> int:
        return max(self.columns // 32, 1)


def fit(config: ScanConfig, dim: int) -> ScanConfig:
    """The config with as many columns as leave the fewest of them idle."""
    if config.columns <= 32:
        return config
    sizes = [c for c in (128, 64, 32) if c <= config.columns]
    return config._replace(columns=min(sizes, key=lambda c: (-(-dim // c) * c, -c)))


def _chunk_tiles(config: ScanConfig, tiles: int, programs: int, tensor: Tensor) -> int:
    """Tiles per chunk of L: as few chunks as fill the processors."""
    chunks = config.chunks
    if chunks == 0:
        wanted = processors_of(tensor) * config.warps_per_processor
        chunks = min(round(wanted / (programs * config.warps)), tiles // config.min_tiles)
    return -(-tiles // max(1, min(chunks, tiles)))


def _options(scan: Scan, config: ScanConfig) -> dict:
    """What all kernels that walk tiles are compiled for."""
    nvidia = compiles_for_nvidia(scan.u)
    return dict(
        HAS_Z=scan.z is not None,
        HAS_BIAS=scan.delta_bias is not None,
        SOFTPLUS=scan.softplus,
        EXACT=scan.u.dtype != torch.bfloat16,
        NVIDIA=nvidia,
        T=config.steps,
        COLUMNS=config.columns,
        num_warps=config.warps,
        num_stages=1,
        **(dict(maxnreg=config.registers) if nvidia else {}),
    )


def _prepare(steps: int, *arguments) -> Scan:
    """The arguments of `prepare` but the first; A becomes [N, dim]."""
    scan = prepare(partial(_coefficients, steps=steps), *arguments)
    return scan._replace(A=scan.A.t().contiguous())


def _coefficients(tensor: Tensor, steps: int) -> Tensor:
    """B or C in fp32, which saves conversions in the kernels, in rows of whole tiles with zeros at the end (small)."""
    if tensor.ndim == 2:
        return tensor.float().contiguous()
    length = tensor.shape[-1]
    if length % steps == 0:
        return tensor.float().contiguous()
    padded = tensor.new_zeros(*tensor.shape[:-1], _padded(length, steps), dtype=torch.float32)
    padded[..., :length] = tensor
    return padded


def _padded(length: int, steps: int) -> int:
    return -(-length // steps) * steps


def forward(scan: Scan, y: Tensor, save: bool, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and, if saved, the states before each tile, [batch, tiles + 1, N, dim]."""
    import triton

    from .forward import scan_forward_kernel

    batch, dim, length = scan.u.shape
    dstate = scan.A.shape[0]
    programs = batch * triton.cdiv(dim, config.columns)
    tiles = triton.cdiv(length, config.steps)
    chunk_tiles = _chunk_tiles(config, tiles, programs, scan.u)
    chunks = triton.cdiv(tiles, chunk_tiles)
    slots, chunk_slots, slot_step = (tiles + 1, chunk_tiles, 1) if save else (chunks, 1, 0)
    states = scan.u.new_empty(batch, slots, dstate, dim, dtype=torch.float32)
    if chunks > 1:
        _carries(scan, states, chunks, chunk_tiles, chunk_slots, config)
    scan_forward_kernel[(programs, chunks)](
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
        length,
        dim,
        dstate,
        scan.group_dim,
        scan.share,
        scan.group_share('B'),
        scan.group_share('C'),
        chunk_tiles,
        chunk_slots,
        slot_step,
        slots,
        *scan.strides('u'),
        *scan.strides('delta'),
        *scan.strides('z'),
        *y.stride()[:-1],
        *scan.strides('B'),
        *scan.strides('C'),
        HAS_D=scan.D is not None,
        HAS_INITIAL=scan.initial is not None,
        CONSTANT_B=scan.B.ndim == 2,
        CONSTANT_C=scan.C.ndim == 2,
        REVERSE=scan.reverse,
        **_options(scan, config),
    )
    return states[:, -1].transpose(1, 2).clone(memory_format=torch.contiguous_format), states


def _carries(
    scan: Scan,
    states: Tensor,
    chunks: int,
    chunk_tiles: int,
    chunk_slots: int,
    config: ScanConfig,
    grad_y: Optional[Tensor] = None,
    grad_last: Optional[Tensor] = None,
) -> None:
    """Fills the first slot of each chunk but the first with the carry into it; given grad_y, of the adjoint walk."""
    import triton

    from .forward import scan_combine_kernel, scan_summary_kernel

    adjoint = grad_y is not None
    x, initial = (grad_y, grad_last) if adjoint else (scan.u, scan.initial)
    z, name = (scan.z, 'C') if adjoint else (None, 'B')
    batch, dim, length = x.shape
    dstate = scan.A.shape[0]
    ends = states.new_empty(batch, chunks - 1, dstate, dim)
    totals = states.new_empty(batch, chunks - 1, dim)
    coefficients = getattr(scan, name)
    options = _options(scan, config)
    options.update(HAS_Z=z is not None)
    scan_summary_kernel[(batch * triton.cdiv(dim, config.columns), chunks - 1)](
        x,
        z if z is not None else x,
        scan.delta,
        scan.A,
        coefficients,
        scan.delta_bias,
        ends,
        totals,
        length,
        dim,
        dstate,
        scan.group_dim,
        scan.share,
        scan.group_share(name),
        chunk_tiles,
        *x.stride()[:-1],
        *((0, 0) if z is None else z.stride()[:-1]),
        *scan.strides('delta'),
        *scan.strides(name),
        CONSTANT_B=coefficients.ndim == 2,
        REVERSE=scan.reverse != adjoint,
        ADJOINT=adjoint,
        **options,
    )
    columns = 32
    scan_combine_kernel[(triton.cdiv(dstate * dim, columns), batch)](
        scan.A,
        initial,
        ends,
        totals,
        states,
        dim,
        dstate,
        chunks,
        states.shape[1],
        chunk_slots,
        HAS_INITIAL=initial is not None,
        CHUNKS=min(64, triton.next_power_of_2(chunks)),
        COLUMNS=columns,
        num_warps=4,
    )


def backward(scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, config: ScanConfig) -> Gradients:
    import triton

    from .backward import scan_backward_kernel

    batch, dim, length = scan.u.shape
    dstate, groups = scan.A.shape[0], scan.groups
    blocks = triton.cdiv(scan.group_dim, config.columns)
    wanted = -(-processors_of(scan.u) * config.warps_per_processor // (batch * groups * config.warps))
    split_blocks = triton.cdiv(blocks, min(blocks, config.splits or max(1, wanted)))
    splits = triton.cdiv(blocks, split_blocks)
    tiles = triton.cdiv(length, config.steps)
    chunk_tiles = _chunk_tiles(config, tiles, batch * groups * splits, scan.u)
    chunks = triton.cdiv(tiles, chunk_tiles)
    padded = _padded(length, config.steps)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scan.u.new_empty(sizes, dtype=dtype)

    carries = empty(batch, chunks, dstate, dim)
    if chunks > 1:
        _carries(scan, carries, chunks, chunk_tiles, 1, config, grad_y, grad_last)
    constant = scan.B.ndim == 2 or scan.C.ndim == 2
    sums = empty(3 if constant else 1, batch, chunks, dstate, dim)
    grad_u = empty(batch, dim, length, dtype=scan.u.dtype)
    grad_delta = empty(batch, dim, length, dtype=scan.delta.dtype if scan.share == 1 else torch.float32)
    grad_z = None if scan.z is None else empty(batch, dim, length, dtype=scan.z.dtype)
    grad_BC = empty(2, splits, batch, groups, dstate, padded)
    grad_D, grad_bias = (None if t is None else empty(chunks, batch, dim) for t in (scan.D, scan.delta_bias))
    scan_backward_kernel[(batch * groups * splits, chunks)](
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
        states,
        carries,
        sums,
        grad_u,
        grad_delta,
        grad_z if grad_z is not None else grad_u,
        grad_BC,
        grad_D,
        grad_bias,
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
        states.shape[1],
        chunk_tiles,
        sums[0].numel(),
        grad_BC[0].numel(),
        *grad_y.stride()[:-1],
        *scan.strides('u'),
        *scan.strides('delta'),
        *scan.strides('z'),
        *scan.strides('B'),
        *scan.strides('C'),
        *grad_u.stride()[:-1],
        HAS_D=scan.D is not None,
        HAS_LAST=grad_last is not None,
        CONSTANT_B=scan.B.ndim == 2,
        CONSTANT_C=scan.C.ndim == 2,
        REVERSE=scan.reverse,
        PRECISION=dot_precision(scan.u),
        **_options(scan, config),
    )

    def coefficient_gradient(coefficients: Tensor, kind: int) -> Tensor:
        if coefficients.ndim == 2:
            return sums[kind].sum(dim=(0, 1)).t()
        grad = grad_BC[kind - 1, ..., :length].unflatten(2, (coefficients.shape[1], -1))
        return grad.sum(dim=(0, 3))

    return Gradients(
        grad_u,
        grad_delta if scan.share == 1 else grad_delta.unflatten(1, (-1, scan.share)).sum(dim=2),
        sums[0].sum(dim=(0, 1)).t(),
        coefficient_gradient(scan.B, 1),
        coefficient_gradient(scan.C, 2),
        None if grad_D is None else grad_D.sum(dim=(0, 1)),
        grad_z,
        None if grad_bias is None else grad_bias.sum(dim=(0, 1)),
        carries[:, -1].transpose(1, 2),
    )


FORWARD = ScanConfig()
BACKWARD = ScanConfig(columns=64, registers=168, warps_per_processor=12)


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    """What `run_forward` saves: the states before each tile and after the last, [batch, tiles + 1, N, dim]."""
    batch, dim, length = u.shape
    return batch, -(-length // FORWARD.steps) + 1, A.shape[1], dim


def run_forward(y: Tensor, save: bool, *arguments) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and the saved states. The arguments are those of `prepare` but the first."""
    config = fit(FORWARD, y.shape[1])
    return forward(_prepare(config.steps, *arguments), y, save, config)


def run_backward(grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, *arguments) -> Gradients:
    scan = _prepare(BACKWARD.steps, *arguments)
    config = BACKWARD
    if config.columns > 32 and scan.u.shape[0] * scan.groups >= processors_of(scan.u):
        # Enough programs for small ones, of which more are at work at once.
        config = config._replace(columns=32, warps_per_processor=16)
    return backward(scan, unit_stride(grad_y), grad_last, states, fit(config, scan.group_dim))
