"""Launches of the selective scan's Triton kernels backward, and of those that sum the gradients of parameters."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..arithmetic import parts
from ..launcher import Launcher
from ..sequences import Gradients, Scan
from .backward import scan_backward_kernel
from .coefficients import total_kernel, unpack_kernel
from .config import STEPS, ScanConfig, cut_of, slots_of, splits_of, states_of
from .launch_forward import (
    carries,
    channels_last,
    constants_of,
    launch,
    move_coefficients,
    pack,
    padded_states,
    strides_of,
)

_backward = Launcher(scan_backward_kernel)
_unpack = Launcher(unpack_kernel)
_total = Launcher(total_kernel)


class Targets(NamedTuple):
    """Where gradients go: those of u, delta (in fp32 where channels share it) and z with the same strides."""

    u: Tensor
    delta: Tensor
    z: Optional[Tensor]
    B: Optional[Tensor]
    C: Optional[Tensor]


def targets_of(scan: Scan) -> Targets:
    """New tensors, laid out as the sequences; B and C have none where they are constant."""
    batch, dim, length, _ = scan.sizes
    last = channels_last(scan.u, scan.delta, scan.z)

    def sequence(dtype: torch.dtype) -> Tensor:
        shape = (batch, length, dim) if last else (batch, dim, length)
        grad = scan.u.new_empty(shape, dtype=dtype)
        return grad.transpose(1, 2) if last else grad

    return Targets(
        sequence(scan.u.dtype),
        sequence(scan.delta.dtype if scan.share == 1 else torch.float32),
        None if scan.z is None else sequence(scan.z.dtype),
        *(None if t.ndim == 2 else t.new_empty(t.shape) for t in (scan.B, scan.C)),
    )


def backward(
    scan: Scan, grad_y: Tensor, grad_last: Optional[Tensor], states: Tensor, config: ScanConfig, targets: Targets
) -> Gradients:
    """Gradients of all tensors, those of `targets` there."""
    batch, dim, length, dstate = scan.sizes
    entries, groups = batch * scan.directions, scan.groups
    blocks = parts(scan.group_dim, config.columns)
    splits = min(blocks, config.splits or splits_of(entries * groups, blocks, slots_of(config, scan.u)))
    split_blocks = parts(blocks, splits)
    splits = parts(blocks, split_blocks)
    tiles = parts(length, STEPS)
    cut = cut_of(config, tiles, entries * groups * splits, entries * parts(dim, config.columns), scan.u)
    chunks = cut.chunks
    padded = padded_states(config, dstate)

    B, C = pack(scan, config)
    adjoints = scan.A.new_empty(entries, chunks, dstate, dim)
    if chunks > 1:
        carries(scan, C, scan.group_share('C'), adjoints, cut, 1, config, grad_y, grad_last)
    constant = B.ndim == 2 or C.ndim == 2
    sums = scan.A.new_empty(entries, chunks, 2 + (3 if constant else 1) * dstate, dim)
    grad_BC = scan.A.new_empty(splits, entries * groups, tiles, padded, 2, STEPS)
    grad_z = targets.u if targets.z is None else targets.z
    z = scan.u if scan.z is None else scan.z
    inputs = grad_y, grad_last, scan.u, scan.delta, scan.A, B, C, scan.D, z, scan.delta_bias
    outputs = states, adjoints, sums, targets.u, targets.delta, grad_z, grad_BC
    shares = scan.group_dim, splits, split_blocks, scan.share, scan.group_share('B'), scan.group_share('C')
    counts = states_of(config, dstate)[1], states.shape[1], cut.chunk_tiles
    sequences = grad_y, scan.u, scan.delta, scan.z, targets.u
    strides = (stride for tensor in sequences for stride in strides_of(tensor))
    flags = scan.D is not None, grad_last is not None, chunks > 1, scan.z is not None, B.ndim == 2, C.ndim == 2
    launch(
        _backward,
        (entries * groups * splits, chunks),
        (*inputs, *outputs),
        (length, dim, dstate, sums.shape[2], *shares, *counts, *strides),
        (*flags, *constants_of(scan, config, STEPS // 2, sequences)),
        scan.u,
        config,
    )
    if not (targets.B is None and targets.C is None):
        moved = (grad_BC, *(grad_BC if grad is None else grad for grad in (targets.B, targets.C)))
        more = entries * groups, scan.group_share('B'), scan.group_share('C'), splits
        move_coefficients(_unpack, scan, moved, (targets.B, targets.C), padded, more)
    grad_A, grad_B, grad_C, grad_D, grad_bias = _totals(scan, sums, targets)
    return Gradients(
        targets.u,
        targets.delta if scan.share == 1 else targets.delta.unflatten(-2, (-1, scan.share)).sum(dim=-2),
        grad_A,
        grad_B,
        grad_C,
        grad_D,
        targets.z,
        grad_bias,
        adjoints[:, -1].transpose(1, 2),
    )


def _totals(scan: Scan, sums: Tensor, targets: Targets) -> tuple[Optional[Tensor], ...]:
    """Gradients of A, B, C, D and the bias; those of B and C that are there already stay."""

    def like(parameter: Optional[Tensor]) -> Optional[Tensor]:
        return None if parameter is None else torch.empty_like(parameter, dtype=torch.float32)

    grad_B = like(scan.B) if targets.B is None else targets.B
    grad_C = like(scan.C) if targets.C is None else targets.C
    grad_A, grad_D, grad_bias = like(scan.A), like(scan.D), like(scan.delta_bias)
    entries, chunks, rows, dim = sums.shape
    columns = 32
    _total(
        (parts(rows * dim, columns), scan.directions),
        (sums, grad_D, grad_bias, grad_A, grad_B, grad_C),
        (entries // scan.directions * chunks, chunks, dim, scan.A.shape[-1], rows),
        (grad_D is not None, grad_bias is not None, scan.B.ndim == 2, scan.C.ndim == 2, 32, columns),
        warps=4,
    )
    return grad_A, grad_B, grad_C, grad_D, grad_bias
