"""Launches the kernels of SS2D."""

from functools import lru_cache
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..backend import compiles_for_nvidia, dot_precision, processors_of
from .arithmetic import parts, power_of_2
from .launcher import Launcher
from .merge_norm import merge_norm, merge_norm_backward
from .ss2d_backward import scan_routes_backward
from .ss2d_forward import scan_routes
from .ss2d_plan import NUM_ROUTES, Launch, Plan, Sizes, magic_of, split, states_shape, wraps

_scan_routes = Launcher(scan_routes)
_scan_routes_backward = Launcher(scan_routes_backward)
_merge_norm = Launcher(merge_norm)
_merge_norm_backward = Launcher(merge_norm_backward)


@lru_cache(maxsize=4096)
def _constants(sizes: Sizes, launch: Launch, wraps: bool, exact: bool, nvidia: bool, precision: str) -> tuple:
    """The last constants of both scans, from R on."""
    return (
        sizes.dt_rank,
        max(power_of_2(sizes.dt_rank), 16),
        sizes.dstate,
        launch.rows,
        launch.splits,
        launch.channels,
        wraps,
        sizes.seqlen * max(sizes.dim, sizes.projections) >= 2**31,
        exact,
        nvidia,
        precision,
    )


def _constants_for(x: Tensor, sizes: Sizes, launch: Launch, wraps: bool) -> tuple:
    return _constants(sizes, launch, wraps, x.dtype != torch.bfloat16, compiles_for_nvidia(x), dot_precision(x))


class Summaries(NamedTuple):
    """What the first of two passes over regions finds of each, and room for what passes from tile to tile.

    States at its end [B, 4, regions, N, dim], the sum of its steps [B, 4, regions, dim], and carries like the states.
    """

    ends: Tensor
    sums: Tensor
    carries: Tensor


def _summaries(sizes: Sizes, regions: int, like: Tensor) -> Summaries:
    if regions == 1 and sizes.dstate == 1:  # all stays in registers
        return Summaries(like, like, like)
    batch, dstate, dim = sizes.batch, sizes.dstate, sizes.dim
    ends = torch.empty(batch, NUM_ROUTES, regions, dstate, dim, dtype=torch.float32, device=like.device)
    return Summaries(ends, ends.new_empty(batch, NUM_ROUTES, regions, dim), torch.empty_like(ends))


def scan_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, keep: bool, sizes: Sizes, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sums of <C, h> / ln 2 over the routes by rows and over those by columns, each [B, H, W, D]; and if they are kept
    the states of `states_shape` / ln 2."""
    launch, wrap = plan.forward, wraps(sizes, plan)
    regions, tiles = split(sizes, launch, wrap)
    y = torch.empty_like(x), torch.empty_like(x)
    shape = states_shape(sizes, plan) if keep else (0, 0, 0)
    states = torch.empty(shape, dtype=torch.float32, device=x.device)
    summaries = _summaries(sizes, regions, A)
    programs = parts(sizes.dim, launch.channels) * 2 * regions * sizes.batch
    tensors = x, x_dbl, dt_weight, dt_bias, A, *y, states, summaries.carries, summaries.ends, summaries.sums
    integers = sizes.height, sizes.width, sizes.dim, magic_of(sizes, launch, wrap), regions, tiles, shape[2]
    constants = _constants_for(x, sizes, launch, wrap)
    for summary in (True, False) if regions > 1 else (False,):
        tiles_kept = launch.steps // plan.backward.steps if keep and not summary else 0
        _scan_routes(
            programs, tensors, integers, (tiles_kept, summary, *constants), launch.warps, _registers(x, launch)
        )
    return y, states


def _registers(x: Tensor, launch: Launch) -> Optional[int]:
    return launch.registers if compiles_for_nvidia(x) else None


class ScanGradients(NamedTuple):
    """Gradients of `scan_forward`: x's of the pairs [B, H, W, D], and along dimension 0 partial sums of those of x_dbl
    [.., B, H, W, 4, E], in the dtype of x, and of all parameters [.., 4 * D * (R + 1 + N)]: dt_weight, dt_bias, A."""

    x_rows: Tensor
    x_columns: Tensor
    x_dbl: Tensor
    parameters: Tensor


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    sizes: Sizes,
    plan: Plan,
) -> ScanGradients:
    """Gradients of the merged map sum(D) * x + ln 2 * sum(y), y and states being those of `scan_forward`, given ln 2
    times the map's."""
    launch, wrap = plan.backward, wraps(sizes, plan)
    regions, tiles = split(sizes, launch, wrap)
    blocks, batch_groups = parts(sizes.dim, launch.channels), parts(sizes.batch, launch.batches)
    grads = ScanGradients(
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty((blocks, *x_dbl.shape), dtype=x.dtype, device=x.device),
        torch.empty(batch_groups * regions, sizes.parameters, dtype=torch.float32, device=x.device),
    )
    summaries = _summaries(sizes, regions, A)
    tensors = grad_y, x, x_dbl, dt_weight, dt_bias, A, D, states, *summaries, *grads
    integers = (
        *(sizes.batch, sizes.height, sizes.width, sizes.dim, magic_of(sizes, launch, wrap)),
        *(regions, tiles, launch.batches, states.shape[2]),
    )
    constants = _constants_for(x, sizes, launch, wrap)
    for summary in (True, False) if regions > 1 else (False,):
        _scan_routes_backward(
            blocks * 2 * regions * batch_groups,
            tensors,
            integers,
            (summary, *constants),
            launch.warps,
            _registers(x, launch),
        )
    return grads


def merge(
    y: tuple[Tensor, Tensor],
    x: Tensor,
    D: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ln 2 * sum(y) + sum(D) * x, normalised if there is a weight; what of it backward needs: the map before the norm,
    and the norm's means and reciprocal deviations [2, pixels]."""
    dim, pixels = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    keep = keep and weight is not None
    merged = torch.empty_like(x) if keep else x.new_empty(0)
    moments = torch.empty(2, pixels if keep else 0, dtype=torch.float32, device=x.device)
    block = power_of_2(dim)
    rows = max(2048 // block, 1)
    tensors = *y, x, D, x if weight is None else weight, x if bias is None else bias, merged, out, moments
    constants = eps, dim, block, rows, weight is not None, keep
    _merge_norm(parts(pixels, rows), tensors, (pixels,), constants, warps=4)
    return out, merged, moments


def merge_backward(
    grad_out: Tensor, merged: Tensor, x: Tensor, weight: Optional[Tensor], moments: Tensor
) -> tuple[Tensor, Tensor]:
    """ln 2 times the gradient of the merged map, and the gradients of the norm's weight, its bias and each route's skip
    connection [3, D]; the first two mean nothing without a weight."""
    dim, pixels = x.shape[-1], x.numel() // x.shape[-1]
    block = power_of_2(dim)
    rows = max(2048 // block, 1)
    programs = max(min(parts(pixels, rows), 8 * processors_of(x)), 1)
    rows_per_program = parts(parts(pixels, programs), rows) * rows
    grad_merged = torch.empty_like(grad_out)
    partial = torch.empty(programs, 3, dim, dtype=torch.float32, device=x.device)
    tensors = grad_out, merged, x, x if weight is None else weight, moments, grad_merged, partial
    constants = dim, block, rows, weight is not None
    _merge_norm_backward(programs, tensors, (pixels, rows_per_program), constants, warps=4)
    return grad_merged, partial.sum(dim=0)
