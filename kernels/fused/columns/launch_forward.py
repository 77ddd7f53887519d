"""Launches of the selective scan's Triton kernels forward: how the work is cut, strides, and constants."""

from typing import Optional

import torch
from torch import Tensor

from ...backend import compiles_for_nvidia
from ..arithmetic import parts, power_of_2
from ..launcher import Launcher
from ..sequences import Scan
from .coefficients import pack_kernel
from .config import STEPS, Cut, ScanConfig, cut_of, states_of
from .forward import scan_combine_kernel, scan_forward_kernel, scan_summary_kernel

_pack = Launcher(pack_kernel)
_forward = Launcher(scan_forward_kernel)
_summary = Launcher(scan_summary_kernel)
_combine = Launcher(scan_combine_kernel)
_PACK_TILES = 4


def strides_of(tensor: Optional[Tensor]) -> tuple[int, ...]:
    """Strides of [batch, 2, dim, L], or of [batch, dim, L] with 0 for the direction; all 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    return strides if len(strides) == 4 else (strides[0], 0, *strides[1:])


def channels_last(*sequences: Optional[Tensor]) -> bool:
    """Whether the channels of a step are neighbours in all sequences."""
    return all(s.stride(-2) == 1 for s in sequences if s is not None) and sequences[0].stride(-1) != 1


def padded_states(config: ScanConfig, dstate: int) -> int:
    states, passes = states_of(config, dstate)
    return states * passes * config.warps


def constants_of(scan: Scan, config: ScanConfig, steps: int, sequences: tuple[Optional[Tensor], ...]) -> tuple:
    """The last constants of all kernels that walk tiles of the sequences, from HAS_BIAS on."""
    states, passes = states_of(config, scan.A.shape[-1])
    return (
        scan.delta_bias is not None,
        scan.softplus,
        scan.directions,
        int(scan.reverse),
        channels_last(*sequences),
        passes == 1,
        scan.u.dtype != torch.bfloat16,
        compiles_for_nvidia(scan.u),
        steps,
        config.warps,
        config.columns,
        states,
    )


def launch(kernel: Launcher, programs: tuple[int, int], tensors, sizes, constants, like: Tensor, config: ScanConfig):
    registers = config.registers if compiles_for_nvidia(like) else None
    kernel(programs, tensors, sizes, constants, config.num_warps, registers, stages=1)


def move_coefficients(
    kernel: Launcher,
    scan: Scan,
    first: tuple[Tensor, ...],
    pair: tuple[Optional[Tensor], ...],
    padded: int,
    more: tuple,
) -> None:
    """Launches `pack_kernel` or `unpack_kernel` on the `pair` [batch, groups, N, L] of B's and C's, None for constants.

    Args:
        first: The kernel's tensors; None of the pair is left out among them.
        more: The kernel's last integers.
    """
    batch, dim, length, dstate = scan.sizes
    shapes = [(0, 1) if tensor is None else tensor.shape[:2] for tensor in pair]
    rows = [entries * groups for entries, groups in shapes]
    block = min(16, power_of_2(padded))
    programs = sum(rows) * parts(padded, block) * parts(parts(length, STEPS), _PACK_TILES)
    sizes = (length, dstate, padded, *rows, *(groups for _, groups in shapes))
    strides = [(0, 0, 0, 0) if tensor is None else tensor.stride() for tensor in pair]
    constants = scan.directions, int(scan.reverse), STEPS, _PACK_TILES, block
    kernel(programs, first, (*sizes, *strides[0], *strides[1], *more), constants, warps=4)


def pack(scan: Scan, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """B and C as the kernels load them: constants as they are, others as `pack_kernel` lays them out."""
    batch, dim, length, dstate = scan.sizes
    padded = padded_states(config, dstate)
    shape = parts(length, STEPS), padded, STEPS
    pair = tuple(None if tensor.ndim == 2 else tensor for tensor in (scan.B, scan.C))

    def room(tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
        return tensor.new_empty(*tensor.shape[:2], *shape, dtype=dtype)

    packed = tuple(tensor if tensor.ndim == 2 else room(tensor) for tensor in (scan.B, scan.C))
    move_coefficients(_pack, scan, (scan.B, scan.C, *packed), pair, padded, ())
    return packed


def forward(scan: Scan, y: Tensor, save: bool, config: ScanConfig) -> tuple[Tensor, Tensor]:
    """Fills y; returns the last state [entries, dim, N] and, if saved, the states before each tile, [entries,
    tiles + 1, N, dim]; entries are directions of elements of the batch."""
    batch, dim, length, dstate = scan.sizes
    entries = batch * scan.directions
    programs = entries * parts(dim, config.columns)
    tiles = parts(length, STEPS)
    cut = cut_of(config, tiles, programs, programs, scan.u)
    chunks = cut.chunks
    slots, chunk_slots, slot_step = (tiles + 1, cut.chunk_tiles, 1) if save else (chunks, 1, 0)
    states = scan.A.new_empty(entries, slots, dstate, dim)
    last = scan.A.new_empty(entries, dim, dstate)
    B, C = pack(scan, config)
    if chunks > 1:
        carries(scan, B, scan.group_share('B'), states, cut, chunk_slots, config)
    z = scan.u if scan.z is None else scan.z
    tensors = scan.u, scan.delta, scan.A, B, C, scan.D, z, scan.delta_bias, scan.initial, y, last, states
    shares = scan.group_dim, scan.share, scan.group_share('B'), scan.group_share('C')
    counts = states_of(config, dstate)[1], cut.chunk_tiles, chunk_slots, slot_step, slots
    sequences = scan.u, scan.delta, scan.z, y
    strides = (stride for tensor in sequences for stride in strides_of(tensor))
    constants = (
        scan.D is not None,
        scan.initial is not None,
        chunks > 1,
        save,
        scan.z is not None,
        B.ndim == 2,
        C.ndim == 2,
    )
    launch(
        _forward,
        (programs, chunks),
        tensors,
        (length, dim, dstate, *shares, *counts, *strides),
        (*constants, *constants_of(scan, config, STEPS, sequences)),
        scan.u,
        config,
    )
    return last, states


def carries(
    scan: Scan,
    coefficients: Tensor,
    group_share: int,
    states: Tensor,
    cut: Cut,
    chunk_slots: int,
    config: ScanConfig,
    grad_y: Optional[Tensor] = None,
    grad_last: Optional[Tensor] = None,
) -> None:
    """Fills the first slot of each chunk but the first with the carry into it.

    `coefficients` are those of B; given grad_y, of C, and the walk is the adjoint one.
    """
    adjoint = grad_y is not None
    x, initial = (grad_y, grad_last) if adjoint else (scan.u, scan.initial)
    z = scan.z if adjoint else None
    batch, dim, length, dstate = scan.sizes
    entries = states.shape[0]
    pieces = (cut.chunks - 1) * cut.pieces
    ends = states.new_empty(entries, pieces, dstate, dim)
    totals = states.new_empty(entries, pieces, dim)
    tensors = x, x if z is None else z, scan.delta, scan.A, coefficients, scan.delta_bias, ends, totals
    sequences = x, z, scan.delta
    counts = states_of(config, dstate)[1], cut.piece_tiles
    strides = (stride for tensor in sequences for stride in strides_of(tensor))
    launch(
        _summary,
        (entries * parts(dim, config.columns), pieces),
        tensors,
        (length, dim, dstate, scan.group_dim, scan.share, group_share, *counts, *strides),
        (adjoint, z is not None, coefficients.ndim == 2, *constants_of(scan, config, STEPS, sequences)),
        scan.u,
        config,
    )
    columns = 32
    _combine(
        (parts(dstate * dim, columns), entries),
        (scan.A, initial, ends, totals, states),
        (dim, dstate, pieces, cut.pieces, states.shape[1], chunk_slots),
        (initial is not None, scan.directions, min(64, power_of_2(pieces)), columns),
        warps=4,
    )
