"""Launches of the selective scan's Triton kernels: how the work is cut, strides, and what is summed afterwards.

Importable without the package triton.
"""

from typing import Optional

import torch
from torch import Tensor

from ...backend import compiles_for_nvidia
from ..sequences import Gradients, Scan, prepare, unit_stride
from .config import STEPS, ScanConfig, chunk_tiles_of, fit, forward_steps, slots_of, splits_of, states_of


def _options(scan: Scan, config: ScanConfig, steps: int) -> dict:
    """What all kernels that walk tiles are compiled for."""
    nvidia = compiles_for_nvidia(scan.u)
    states, passes = states_of(config, scan.A.shape[1])
    return dict(
        HAS_Z=scan.z is not None,
        HAS_BIAS=scan.delta_bias is not None,
        SOFTPLUS=scan.softplus,
        REVERSE=scan.reverse,
        ONE_PASS=passes == 1,
        EXACT=scan.u.dtype != torch.bfloat16,
        NVIDIA=nvidia,
        T=steps,
        W=config.warps,
        COLUMNS=config.columns,
        STATES=states,
        num_warps=config.num_warps,
        num_stages=1,
        **(dict(maxnreg=config.registers) if nvidia else {}),
    )


def _constants(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous() if tensor.ndim == 2 else tensor


def _pack(scan: Scan, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """B and C as the kernels load them: constants as they are, others as `pack_kernel` lays them out."""
    import triton

    from .coefficients import pack_kernel

    length, dstate = scan.u.shape[2], scan.A.shape[1]
    tiles = triton.cdiv(length, STEPS)
    states, passes = states_of(config, dstate)
    padded = states * passes * config.warps
    packed, rows, groups, strides = [], [], [], []
    for tensor in (scan.B, scan.C):
        constant = tensor.ndim == 2
        batch, group = (0, 1) if constant else tensor.shape[:2]
        packed.append(tensor if constant else tensor.new_empty(batch, group, tiles, padded, STEPS, dtype=torch.float32))
        rows.append(batch * group)
        groups.append(group)
        strides += (0, 0, 0, 0) if constant else tensor.stride()
    if sum(rows):
        block, block_tiles = min(16, triton.next_power_of_2(padded)), 4
        pack_kernel[(sum(rows) * triton.cdiv(padded, block) * triton.cdiv(tiles, block_tiles),)](
            scan.B,
            scan.C,
            *packed,
            length,
            dstate,
            padded,
            *rows,
            *groups,
            *strides,
            REVERSE=scan.reverse,
            T=STEPS,
            TILES=block_tiles,
            STATES=block,
        )
    return packed[0], packed[1]


def _unpack(scan: Scan, partial: Tensor, padded: int) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of B and C from what `scan_backward_kernel` wrote; None of constants."""
    import triton

    from .coefficients import unpack_kernel

    length, dstate = scan.u.shape[2], scan.A.shape[1]
    tiles = triton.cdiv(length, STEPS)
    grads = [
        None if t.ndim == 2 else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (scan.B, scan.C)
    ]
    rows = [0 if grad is None else grad.shape[0] * grad.shape[1] for grad in grads]
    if sum(rows):
        block, block_tiles = min(16, triton.next_power_of_2(padded)), 4
        unpack_kernel[(sum(rows) * triton.cdiv(padded, block) * triton.cdiv(tiles, block_tiles),)](
            partial,
            *(partial if grad is None else grad for grad in grads),
            length,
            dstate,
            padded,
            *rows,
            scan.groups,
            scan.u.shape[0],
            scan.group_share('B'),
            scan.group_share('C'),
            partial.shape[0],
            REVERSE=scan.reverse,
            T=STEPS,
            TILES=block_tiles,
            STATES=block,
        )
    return grads[0], grads[1]


def forward(scan: Scan, y: Tensor, save: bool, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and, if saved, the states before each tile, [batch, tiles + 1, N, dim]."""
    import triton

    from .forward import scan_forward_kernel

    batch, dim, length = scan.u.shape
    dstate = scan.A.shape[1]
    programs = batch * triton.cdiv(dim, config.columns)
    tiles = triton.cdiv(length, STEPS)
    chunk_tiles = chunk_tiles_of(config, tiles, programs, scan.u)
    chunks = triton.cdiv(tiles, chunk_tiles)
    slots, chunk_slots, slot_step = (tiles + 1, chunk_tiles, 1) if save else (chunks, 1, 0)
    states = scan.u.new_empty(batch, slots, dstate, dim, dtype=torch.float32)
    last = scan.u.new_empty(batch, dim, dstate, dtype=torch.float32)
    B, C = _pack(scan, config)
    if chunks > 1:
        _carries(scan, B, scan.group_share('B'), states, chunks, chunk_tiles, chunk_slots, config)
    scan_forward_kernel[(programs, chunks)](
        scan.u,
        scan.delta,
        scan.A,
        B,
        C,
        scan.D,
        scan.z if scan.z is not None else scan.u,
        scan.delta_bias,
        scan.initial,
        y,
        last,
        states,
        length,
        dim,
        dstate,
        scan.group_dim,
        scan.share,
        scan.group_share('B'),
        scan.group_share('C'),
        states_of(config, dstate)[1],
        chunk_tiles,
        chunk_slots,
        slot_step,
        slots,
        *scan.A.stride(),
        *scan.strides('u'),
        *scan.strides('delta'),
        *scan.strides('z'),
        *y.stride()[:-1],
        HAS_D=scan.D is not None,
        HAS_INITIAL=scan.initial is not None,
        CONSTANT_B=B.ndim == 2,
        CONSTANT_C=C.ndim == 2,
        CHUNKED=chunks > 1,
        SAVE=save,
        **_options(scan, config, forward_steps(config, dstate)),
    )
    return last, states


def _carries(
    scan: Scan,
    coefficients: Tensor,
    group_share: int,
    states: Tensor,
    chunks: int,
    chunk_tiles: int,
    chunk_slots: int,
    config: ScanConfig,
    grad_y: Optional[Tensor] = None,
    grad_last: Optional[Tensor] = None,
) -> None:
    """Fills the first slot of each chunk but the first with the carry into it.

    `coefficients` are those of B; given grad_y, of C, and the walk is the adjoint one.
    """
    import triton

    from .forward import scan_combine_kernel, scan_summary_kernel

    adjoint = grad_y is not None
    x, initial = (grad_y, grad_last) if adjoint else (scan.u, scan.initial)
    z = scan.z if adjoint else None
    batch, dim, length = x.shape
    dstate = scan.A.shape[1]
    ends = states.new_empty(batch, chunks - 1, dstate, dim)
    totals = states.new_empty(batch, chunks - 1, dim)
    options = _options(scan, config, forward_steps(config, dstate))
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
        group_share,
        states_of(config, dstate)[1],
        chunk_tiles,
        *scan.A.stride(),
        *x.stride()[:-1],
        *((0, 0) if z is None else z.stride()[:-1]),
        *scan.strides('delta'),
        CONSTANT_B=coefficients.ndim == 2,
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
        *scan.A.stride(),
        HAS_INITIAL=initial is not None,
        CHUNKS=min(64, triton.next_power_of_2(chunks)),
        COLUMNS=columns,
        num_warps=4,
    )


def backward(scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, config: ScanConfig) -> Gradients:
    import triton

    from .backward import scan_backward_kernel

    batch, dim, length = scan.u.shape
    dstate, groups = scan.A.shape[1], scan.groups
    blocks = triton.cdiv(scan.group_dim, config.columns)
    splits = min(blocks, config.splits or splits_of(batch * groups, blocks, slots_of(config, scan.u)))
    split_blocks = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, split_blocks)
    tiles = triton.cdiv(length, STEPS)
    chunk_tiles = chunk_tiles_of(config, tiles, batch * groups * splits, scan.u)
    chunks = triton.cdiv(tiles, chunk_tiles)
    state_count, passes = states_of(config, dstate)
    padded = state_count * passes * config.warps

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return scan.u.new_empty(sizes, dtype=dtype)

    B, C = _pack(scan, config)
    carries = empty(batch, chunks, dstate, dim)
    if chunks > 1:
        _carries(scan, C, scan.group_share('C'), carries, chunks, chunk_tiles, 1, config, grad_y, grad_last)
    constant = B.ndim == 2 or C.ndim == 2
    sums = empty(batch * chunks, 2 + (3 if constant else 1) * dstate, dim)
    grad_u = empty(batch, dim, length, dtype=scan.u.dtype)
    grad_delta = empty(batch, dim, length, dtype=scan.delta.dtype if scan.share == 1 else torch.float32)
    grad_z = None if scan.z is None else empty(batch, dim, length, dtype=scan.z.dtype)
    grad_BC = empty(splits, batch, groups, tiles, padded, 2, STEPS)
    scan_backward_kernel[(batch * groups * splits, chunks)](
        grad_y,
        grad_last,
        scan.u,
        scan.delta,
        scan.A,
        B,
        C,
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
        length,
        dim,
        dstate,
        sums.shape[1],
        scan.group_dim,
        splits,
        split_blocks,
        scan.share,
        scan.group_share('B'),
        scan.group_share('C'),
        passes,
        states.shape[1],
        chunk_tiles,
        *scan.A.stride(),
        *grad_y.stride()[:-1],
        *scan.strides('u'),
        *scan.strides('delta'),
        *scan.strides('z'),
        *grad_u.stride()[:-1],
        HAS_D=scan.D is not None,
        HAS_LAST=grad_last is not None,
        CONSTANT_B=B.ndim == 2,
        CONSTANT_C=C.ndim == 2,
        CHUNKED=chunks > 1,
        **_options(scan, config, STEPS // 2),
    )
    grad_A, grad_B, grad_C, grad_D, grad_bias = _totals(scan, sums, *_unpack(scan, grad_BC, padded))
    return Gradients(
        grad_u,
        grad_delta if scan.share == 1 else grad_delta.unflatten(1, (-1, scan.share)).sum(dim=2),
        grad_A,
        grad_B,
        grad_C,
        grad_D,
        grad_z,
        grad_bias,
        carries[:, -1].transpose(1, 2),
    )


def _totals(
    scan: Scan, sums: Tensor, grad_B: Optional[Tensor], grad_C: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    """Gradients of A, B, C, D and the bias; those of B and C that are given stay."""
    import triton

    from .coefficients import total_kernel

    def like(parameter: Optional[Tensor]) -> Optional[Tensor]:
        return None if parameter is None else torch.empty_like(parameter, dtype=torch.float32)

    grads = dict(
        grad_D=like(scan.D),
        grad_bias=like(scan.delta_bias),
        grad_A=torch.empty_like(scan.A),
        grad_B=like(scan.B) if grad_B is None else grad_B,
        grad_C=like(scan.C) if grad_C is None else grad_C,
    )
    count, rows, dim = sums.shape
    columns = 32
    total_kernel[(triton.cdiv(rows * dim, columns),)](
        sums,
        **grads,
        count=count,
        dim=dim,
        dstate=scan.A.shape[1],
        sum_rows=rows,
        HAS_D=scan.D is not None,
        HAS_BIAS=scan.delta_bias is not None,
        CONSTANT_B=scan.B.ndim == 2,
        CONSTANT_C=scan.C.ndim == 2,
        COUNT=32,
        COLUMNS=columns,
    )
    return tuple(grads[f'grad_{name}'] for name in ('A', 'B', 'C', 'D', 'bias'))


FORWARD = ScanConfig()
SAVING = ScanConfig(warps=8)
BACKWARD = ScanConfig(warps=8)


def states_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    """What `run_forward` saves: the states before each tile and after the last, [batch, tiles + 1, N, dim]."""
    batch, dim, length = u.shape
    return batch, -(-length // STEPS) + 1, A.shape[1], dim


def run_forward(y: Tensor, save: bool, *arguments) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state and the saved states. The arguments are those of `prepare` but the first."""
    scan = prepare(_constants, *arguments)
    return forward(scan, y, save, fit(SAVING if save else FORWARD, scan.A.shape[1]))


def run_backward(grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, *arguments) -> Gradients:
    scan = prepare(_constants, *arguments)
    return backward(scan, unit_stride(grad_y), grad_last, states, fit(BACKWARD, scan.A.shape[1]))
