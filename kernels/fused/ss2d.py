"""Launches the kernels of SS2D."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..backend import compiles_for_nvidia, device_of, dot_precision, processors_of
from .merge_norm import merge_norm, merge_norm_backward
from .ss2d_backward import scan_routes_backward
from .ss2d_forward import scan_routes

_ROUTES = 4


def _parts(size: int, part: int) -> int:
    """Parts of at most `part` that make up `size`. (Triton's own functions of this kind are slow on the host.)"""
    return -(-size // part)


def _power_of_2(size: int) -> int:
    """The smallest power of 2 that is not below `size`."""
    return 1 << (size - 1).bit_length()


class Launch(NamedTuple):
    """Sizes of a launch.

    Args:
        rows: Steps of a tile that a thread walks.
        splits: Threads that share the steps of a tile; rows * splits must be 16 at least.
        channels: Channels of a tile, a multiple of 16.
        regions: Parts of the map that are walked at the same time; more than one costs a pass for their states.
        blocks: Blocks of channels that a program of the backward pass walks, one after the other.
        batches: Entries of the batch that it walks for each of them.
        registers: Most registers of a thread, to have enough threads at work; None leaves them to the compiler.
    """

    rows: int
    splits: int
    channels: int
    regions: int
    blocks: int = 1
    batches: int = 1
    registers: Optional[int] = None

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.rows * self.splits

    @property
    def warps(self) -> int:
        """Warps of a program, with one column of a tile for each thread."""
        return self.splits * self.channels // 16


class Sizes(NamedTuple):
    batch: int
    height: int
    width: int
    dim: int
    dt_rank: int
    dstate: int


def sizes_of(x: Tensor, dt_weight: Tensor, A: Tensor) -> Sizes:
    return Sizes(*x.shape, dt_weight.shape[-1], A.shape[-1])


class Plan(NamedTuple):
    """Launches of both passes.

    The backward pass starts its tiles from saved states: they must be the tiles of the forward pass, or what a thread
    of it walks of one.
    """

    forward: Launch
    backward: Launch


def plan(sizes: Sizes, processors: int) -> Plan:
    """Few regions while the batch and the channels alone give every processor enough programs."""
    programs = sizes.batch * 2 * _parts(sizes.dim, 32)
    regions = _regions(sizes, programs, processors)
    # What fits on the processors at once is decided by registers: three programs of four warps with 168 each, two
    # with what the compiler would take. Many programs hide the latency of each other's steps; few share the steps of
    # a tile between threads.
    fits_at_once = 2 * processors < programs * regions <= 3 * processors
    forward = Launch(16, 2 if programs * regions <= 3 * processors else 1, 32, regions, registers=168)
    # What is left over of programs sums the gradients of parameters over the batch, which saves memory.
    batches = max(programs * regions // (5 * processors), 1)
    registers = 168 if fits_at_once else None
    return Plan(forward, Launch(8, 2, 32, regions, batches=batches, registers=registers))


def _regions(sizes: Sizes, programs: int, processors: int) -> int:
    wanted = _parts(8 * processors, max(programs, 1)) if programs < processors else 1
    return max(min(wanted, sizes.height * sizes.width // 128), 1)


def states_shape(sizes: Sizes, plan: Plan) -> tuple[int, ...]:
    """State before each tile of the backward pass on each route, [B, 4, states, N, D]."""
    return sizes.batch, _ROUTES, _tiles(sizes, plan.backward.steps, _wraps(sizes, plan)), sizes.dstate, sizes.dim


def _wraps(sizes: Sizes, plan: Plan) -> bool:
    """Whether tiles cross the ends of columns: where ending them there would leave too many steps unused."""
    steps = max(plan.forward.steps, plan.backward.steps)
    return sizes.height > 1 and _parts(sizes.height, steps) * steps > 1.2 * sizes.height


def _tiles(sizes: Sizes, steps: int, wraps: bool) -> int:
    """Tiles of a route, the larger number of rows and columns."""
    tiles = _parts(sizes.height * sizes.width, steps)
    if wraps or sizes.height == 1:
        return tiles
    return max(tiles, sizes.width * _parts(sizes.height, steps))


def _split(sizes: Sizes, launch: Launch, wraps: bool) -> tuple[int, int]:
    """Regions, none of them empty, and tiles of a region: an even number, since two routes meet half way."""
    tiles = _tiles(sizes, launch.steps, wraps)
    region_tiles = 2 * _parts(tiles, 2 * launch.regions)
    return _parts(tiles, region_tiles), region_tiles


def _constants(sizes: Sizes, launch: Launch, wraps: bool, x: Tensor) -> dict:
    columns = max(sizes.dim, _ROUTES * (sizes.dt_rank + 2 * sizes.dstate))
    return dict(
        R=sizes.dt_rank,
        RP=max(_power_of_2(sizes.dt_rank), 16),
        N=sizes.dstate,
        ROWS=launch.rows,
        SPLITS=launch.splits,
        DB=launch.channels,
        WRAP=wraps,
        EVEN=sizes.dim % launch.channels == 0,
        WIDE=sizes.height * sizes.width * columns >= 2**31,
        EXACT=x.dtype == torch.float32,
        NVIDIA=compiles_for_nvidia(x),
        PRECISION=dot_precision(x),
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )


def _magic(height: int) -> int:
    """ceil(2**32 / height) as a signed integer of 32 bits; see `walk`."""
    magic = -(-(2**32) // height) if height > 1 else 0
    return magic - 2**32 if magic >= 2**31 else magic


def scan_forward(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, keep: bool, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sums of <C, h> / ln 2 over the routes by rows and over those by columns, each [B, H, W, D]; and if they are kept
    the states of `states_shape` / ln 2."""
    sizes = sizes_of(x, dt_weight, A)
    launch, wraps = plan.forward, _wraps(sizes, plan)
    regions, tiles = _split(sizes, launch, wraps)
    y = torch.empty_like(x), torch.empty_like(x)
    states = A.new_empty(states_shape(sizes, plan) if keep else (0, 0, 0))
    ends, sums = _summaries(sizes, regions, A)
    carries = torch.empty_like(ends)
    grid = (_parts(sizes.dim, launch.channels) * 2 * regions * sizes.batch,)
    if not grid[0]:
        return y, states
    with device_of(x):
        for summary in (True, False) if regions > 1 else (False,):
            scan_routes[grid](
                x,
                x_dbl,
                dt_weight,
                dt_bias,
                A,
                *y,
                states,
                carries,
                ends,
                sums,
                sizes.height,
                sizes.width,
                sizes.dim,
                _magic(sizes.height),
                regions,
                tiles,
                states.shape[2],
                STATES=launch.steps // plan.backward.steps if keep and not summary else 0,
                SUMMARY=summary,
                **_constants(sizes, launch, wraps, x),
            )
    return y, states


def _summaries(sizes: Sizes, regions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    ends = like.new_empty(sizes.batch, _ROUTES, regions, sizes.dstate, sizes.dim)
    return ends, like.new_empty(sizes.batch, _ROUTES, regions, sizes.dim)


class ScanGradients(NamedTuple):
    """Partial sums of the gradients of `scan_forward`: x's of the pairs [B, H, W, D], the others along dimension 0."""

    x_rows: Tensor
    x_columns: Tensor
    x_dbl: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor


def scan_backward(
    grad_y: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    states: Tensor,
    plan: Plan,
) -> ScanGradients:
    """Gradients of the merged map skip * x + ln 2 * sum(y), y and states being those of `scan_forward`."""
    sizes = sizes_of(x, dt_weight, A)
    launch, wraps = plan.backward, _wraps(sizes, plan)
    regions, tiles = _split(sizes, launch, wraps)
    groups = _parts(_parts(sizes.dim, launch.channels), launch.blocks)
    batch_groups = _parts(sizes.batch, launch.batches)
    ends, sums = _summaries(sizes, regions, A)
    carries = torch.empty_like(ends)
    grads = ScanGradients(
        torch.empty_like(x),
        torch.empty_like(x),
        # Sums in the dtype of x are enough unless they grow from block to block.
        (x if launch.blocks == 1 else A).new_empty(groups, *x_dbl.shape),
        A.new_empty(batch_groups * regions, *dt_weight.shape),
        A.new_empty(batch_groups * regions, *dt_bias.shape),
        A.new_empty(batch_groups * regions, *A.shape),
    )
    grid = (groups * 2 * regions * batch_groups,)
    if not grid[0]:
        return grads
    with device_of(x):
        for summary in (True, False) if regions > 1 else (False,):
            scan_routes_backward[grid](
                grad_y,
                x,
                x_dbl,
                dt_weight,
                dt_bias,
                A,
                skip,
                states,
                ends,
                sums,
                carries,
                *grads,
                sizes.batch,
                sizes.height,
                sizes.width,
                sizes.dim,
                _magic(sizes.height),
                regions,
                tiles,
                launch.blocks,
                launch.batches,
                states.shape[2],
                SUMMARY=summary,
                **_constants(sizes, launch, wraps, x),
            )
    return grads


def merge(
    y: tuple[Tensor, Tensor],
    x: Tensor,
    skip: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln 2 * sum(y) + skip * x, normalised if there is a weight; what of it backward needs: map, mean, rstd."""
    dim = x.shape[-1]
    pixels = x.numel() // max(dim, 1)
    out = torch.empty_like(x)
    keep = keep and weight is not None
    merged = torch.empty_like(x) if keep else x.new_empty(0)
    mean, rstd = (skip.new_empty(pixels if keep else 0) for _ in range(2))
    block = _power_of_2(dim)
    rows = max(2048 // block, 1)
    with device_of(x):
        if pixels:
            merge_norm[(_parts(pixels, rows),)](
                *y,
                x,
                skip,
                skip if weight is None else weight,
                skip if bias is None else bias,
                merged,
                out,
                mean,
                rstd,
                pixels,
                eps,
                dim=dim,
                BLOCK=block,
                ROWS=rows,
                NORM=weight is not None,
                SAVE=keep,
                num_warps=4,
            )
    return out, merged, mean, rstd


def merge_backward(
    grad_out: Tensor, merged: Tensor, x: Tensor, weight: Optional[Tensor], mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the merged map, and of the norm's weight, its bias and the skip connection [D]."""
    dim = x.shape[-1]
    pixels = x.numel() // max(dim, 1)
    block = _power_of_2(dim)
    rows = max(2048 // block, 1)
    programs = max(min(_parts(pixels, rows), 8 * processors_of(x)), 1)
    rows_per_program = _parts(_parts(pixels, programs), rows) * rows
    grad_merged = grad_out if weight is None else torch.empty_like(grad_out)
    partial = torch.zeros(3, programs, dim, dtype=torch.float32, device=x.device)
    with device_of(x):
        merge_norm_backward[(programs,)](
            grad_out,
            merged,
            x,
            partial if weight is None else weight,
            mean,
            rstd,
            grad_merged,
            *partial,
            pixels,
            rows_per_program,
            dim=dim,
            BLOCK=block,
            ROWS=rows,
            NORM=weight is not None,
            num_warps=4,
        )
    return grad_merged, *partial.sum(dim=1)
