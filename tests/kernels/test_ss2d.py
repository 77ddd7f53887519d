"""SS2D: the routes over a map, and the scans along them, against walks over (row, column) pairs in float64.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), mostly on tiles of 16 steps by 16 channels.
"""

from itertools import product

import kernel_cases
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, needs_triton
from kernel_cases import CASES, compare, in_double, run
from recorder import Recorder
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import (
    NUM_ROUTES,
    chunked,
    cross_merge,
    cross_scan,
    layer_norm,
    naive,
    ss2d_core,
    ss2d_scan,
    use_triton,
)
from vmamba.kernels._launch import tl, triton
from vmamba.kernels.ss2d import launch
from vmamba.kernels.ss2d.launch import Plan, Schedule, Sizes, Tile
from vmamba.kernels.ss2d.routes import line_of

SCAN, CORE = CASES['ss2d_scan'], CASES['ss2d_core']
SMALL = Schedule(Tile(8, 2, 16), chunks=1)

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')
scan_and_core = pytest.mark.parametrize('case', [SCAN, CORE], ids=['scan', 'core'])


@pytest.fixture
def schedule(monkeypatch):
    """Sets the schedules of both passes, which are the same unless they are given separately."""

    def set_schedules(forward=SMALL, backward=None):
        plan = Plan(forward, backward or forward)
        monkeypatch.setattr(launch, 'plan', lambda *facts: plan)

    set_schedules()
    return set_schedules


# Pixels of a map numbered row by row, in the order that each route visits them.
ROUTES = {
    (2, 3): [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]],
    (3, 2): [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0], [5, 3, 1, 4, 2, 0]],
    (1, 4): [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0], [3, 2, 1, 0]],
    (3, 1): [[0, 1, 2], [0, 1, 2], [2, 1, 0], [2, 1, 0]],
    (1, 1): [[0], [0], [0], [0]],
}


@pytest.mark.parametrize('size', ROUTES, ids='{0[0]}x{0[1]}'.format)
def test_routes_visit_the_pixels_in_the_order_written_out(size):
    x = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size)
    visited = cross_scan(torch.cat([x, x + 100], dim=1))
    expected = torch.tensor(ROUTES[size], dtype=torch.float32)
    assert torch.equal(visited[0, :, 0], expected)
    assert torch.equal(visited[0, :, 1], expected + 100)


@pytest.mark.parametrize('size', ROUTES, ids='{0[0]}x{0[1]}'.format)
def test_merging_sums_the_routes_where_they_passed(size):
    pixels = size[0] * size[1]
    y = torch.randn(2, NUM_ROUTES, 3, pixels, dtype=torch.float64)
    expected = torch.zeros(2, 3, pixels, dtype=torch.float64)
    for k, route in enumerate(ROUTES[size]):
        for step, pixel in enumerate(route):
            expected[:, :, pixel] += y[:, k, :, step]
    oracles.assert_matches(cross_merge(y, *size), expected.view(2, 3, *size), torch.float64)


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 1), (2, 3), (7, 5), (13, 6)], ids='{0[0]}x{0[1]}'.format)
def test_scan_and_merge_are_each_the_adjoint_of_the_other(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, NUM_ROUTES, 3, size[0] * size[1], dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x), cross_merge(y, *size)
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (grad_x,) = torch.autograd.grad(scanned, x, y.detach())
    (grad_y,) = torch.autograd.grad(merged, y, x.detach())
    oracles.assert_matches(grad_x, merged, torch.float64)
    oracles.assert_matches(grad_y, scanned, torch.float64)
    expected = [[h * size[1] + w for h, w in pixels] for pixels in oracles.route_pixels(*size)]
    assert naive.route_positions(*size).tolist() == expected


def test_memory_layouts_and_empty_batches_of_the_routes():
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, NUM_ROUTES, 3, 20)
    assert torch.equal(cross_scan(x.contiguous(memory_format=torch.channels_last)), cross_scan(x))
    moved = y.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(cross_merge(moved, 5, 4), cross_merge(y, 5, 4))
    assert cross_scan(x[:0]).shape == (0, NUM_ROUTES, 3, 20)
    assert cross_merge(y[:0], 5, 4).shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    'call,shown',
    [
        pytest.param(lambda: cross_scan(torch.zeros(3, 5, 4)), r'\(3, 5, 4\)', id='map-rank'),
        pytest.param(lambda: cross_merge(torch.zeros(4, 3, 20), 5, 4), r'\(4, 3, 20\)', id='rank'),
        pytest.param(lambda: cross_merge(torch.zeros(1, 4, 3, 21), 5, 4), r'5x4 map, got \(1, 4, 3, 21\)', id='length'),
        pytest.param(lambda: cross_merge(torch.zeros(1, 3, 3, 20), 5, 4), r'\(1, 3, 3, 20\)', id='three-routes'),
    ],
)
def test_bad_arguments_of_the_routes_are_errors_that_show_them(call, shown):
    with pytest.raises(ValueError, match=shown):
        call()


MAPS = [
    pytest.param(SCAN, dict(size=(1, 1)), id='pixel'),
    pytest.param(CORE, dict(size=(1, 1), dim=3), id='pixel-core-dim3'),
    pytest.param(SCAN, dict(size=(1, 19), dstate=2), id='row-n2'),
    pytest.param(SCAN, dict(size=(19, 1)), id='column'),
    pytest.param(CORE, dict(size=(16, 1)), id='column-of-a-tile-core'),
    pytest.param(CORE, dict(size=(5, 4)), id='tiles-cross-columns-core'),
    pytest.param(SCAN, dict(size=(3, 6), dstate=3), id='tiles-cross-columns-n3'),
    pytest.param(CORE, dict(size=(15, 2), dstate=2), id='tiles-end-with-columns-core-n2'),
    pytest.param(CORE, dict(size=(3, 3), dim=33), id='dim33-core'),
    pytest.param(SCAN, dict(size=(2, 3), dim=1, dt_rank=1), id='dim1-rank1'),
    pytest.param(SCAN, dict(size=(2, 3), dt_rank=17), id='rank17'),
    pytest.param(CORE, dict(size=(2, 3), batch=3, dt_rank=5), id='batch3-rank5-core'),
]


def arguments(case, size=(5, 4), batch=1, dim=16, dstate=1, dt_rank=3, dtype=torch.float32):
    return case.arguments(batch, size, dim, dstate, dt_rank, dtype)


@pytest.mark.parametrize('case,sizes', MAPS)
def test_maps(case, sizes, dtype, schedule):
    compare(case, arguments(case, **sizes, dtype=dtype), dtype)


# The tiles of the backward pass are those of the forward pass, or what a thread walks of one.
SCHEDULES = [
    pytest.param(Schedule(Tile(16, 1, 16), 1), None, dict(size=(3, 11)), id='one-split'),
    pytest.param(Schedule(Tile(8, 2, 32), 1), None, dict(size=(3, 3), dim=40), id='channels-32'),
    pytest.param(Schedule(Tile(16, 2, 16), 1), SMALL, dict(size=(27, 2)), id='half-tiles'),
    pytest.param(Schedule(Tile(16, 4, 16), 1), Schedule(Tile(4, 4, 16), 1), dict(size=(11, 7)), id='quarter-tiles'),
    pytest.param(SMALL._replace(chunks=2), None, dict(size=(3, 11), dstate=2), id='chunks-cross-columns-n2'),
    pytest.param(SMALL._replace(chunks=5), None, dict(size=(15, 3)), id='fewer-tiles-than-chunks'),
    pytest.param(SMALL, SMALL._replace(chunks=2, batches=2), dict(size=(3, 11), batch=3, dim=5), id='batches-chunks'),
]


@pytest.mark.parametrize('forward,backward,sizes', SCHEDULES)
def test_schedules(forward, backward, sizes, triton_kernels, schedule):
    schedule(forward, backward)
    compare(SCAN, arguments(SCAN, **sizes), torch.float32)


def test_the_schedules_that_are_chosen(triton_kernels):
    compare(CORE, arguments(CORE, (3, 6)), torch.float32)


@pytest.mark.parametrize('size', [(1, 1), (7, 7), (56, 56), (4096, 1), (1, 4096), (512, 512)], ids=str)
def test_chosen_schedules_fit_together(size):
    for batch, dim, dstate, processors in product((0, 1, 64), (1, 33, 96, 768), (1, 16), (1, 20, 132)):
        sizes = Sizes(batch, *size, dim, 6, dstate)
        forward, backward = plan = launch.plan_of(sizes, launch.Device('tf32', processors, 2**16, False, True))
        assert backward.steps in (forward.steps, forward.tile.steps)
        for chosen in plan:
            assert chosen.steps >= 16 and chosen.tile.block_d % 16 == 0
            assert min(chosen.chunks, chosen.batches, chosen.warps) >= 1
            assert launch._cut(sizes, chosen, launch._wraps(sizes, plan))[0] >= 1
        unused = launch.states_shape(sizes, plan)[2] * backward.steps - size[0] * size[1]
        assert unused < max(backward.steps, 0.21 * size[0] * size[1]), 'tiles are nearly full'


@pytest.mark.parametrize(
    'precision,kibibytes,rank,widths',
    [
        ('tf32', 64, 48, (32, 16)),
        ('tf32', 64, 24, (32, 32)),
        ('tf32', 99, 48, (32, 32)),
        ('tf32x3', 163, 48, (32, 16)),
        ('tf32x3', 227, 48, (32, 32)),
        ('tf32x3', 99, 128, (16, 16)),
    ],
)
def test_little_shared_memory_takes_narrower_tiles_for_large_ranks(precision, kibibytes, rank, widths):
    plan = launch.plan_of(Sizes(64, 7, 7, 768, rank, 1), launch.Device(precision, 132, kibibytes * 1024, False, True))
    assert tuple(schedule.tile.block_d for schedule in plan) == widths


def test_several_tiles_in_half_precision(triton_kernels, schedule):
    compare(SCAN, arguments(SCAN, (3, 6), dim=13, dtype=torch.float16), torch.float16)


def core_with_rounded_projections(x, x_proj_weight, norm_weight, norm_bias, norm_eps, **parameters):
    """The definition with projections that are made as those of a map in fp16."""
    x_dbl = half(x @ half(x_proj_weight).T).unflatten(-1, (NUM_ROUTES, -1))
    return oracles.layer_norm(oracles.ss2d_scan(x, x_dbl, **parameters), norm_weight, norm_bias, norm_eps)


def half(x):
    """x rounded to fp16, with the gradient of x."""
    return x + (x.half() - x).detach()


@pytest.mark.parametrize('wide', ['', 'x_proj_weight', 'dt_weight norm_weight'])
def test_parameters_in_half_precision(wide, backend, schedule):
    """As of a model that is in half precision as a whole, except some."""
    tensors = {k: t if k in wide.split() else t.half() for k, t in arguments(CORE, (2, 3)).items()}
    compare(CORE._replace(definition=core_with_rounded_projections), tensors, torch.float16)


def test_projections_wider_than_the_map(backend, schedule):
    """As under autocast, where what is not made by a linear layer stays in fp32."""
    tensors = arguments(SCAN, (2, 3))
    tensors['x'] = tensors['x'].half()
    compare(SCAN, tensors, torch.float16)


@scan_and_core
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_autocast_does_not_change_the_dtype(case, dtype, backend, schedule):
    tensors = arguments(case, (2, 3), dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = case.function(**tensors, **case.options)
    assert y.dtype == dtype
    oracles.assert_matches(y.cpu(), case.definition(**in_double(tensors), **case.options), torch.bfloat16)


def test_the_core_is_its_parts(dtype, schedule):
    """A projection, the scan and the norm."""

    def parts(x, x_proj_weight, norm_weight, norm_bias, norm_eps, **parameters):
        x_dbl = F.linear(x, x_proj_weight).unflatten(-1, (NUM_ROUTES, -1))
        return layer_norm(ss2d_scan(x, x_dbl, **parameters), norm_weight, norm_bias, norm_eps)

    tensors = arguments(CORE, (2, 3), dstate=2, dtype=dtype)
    oracles.assert_all_match(run(ss2d_core, tensors, norm_eps=1e-3), run(parts, tensors, norm_eps=1e-3), dtype)


def test_eps_of_the_norm(dtype, schedule):
    compare(CORE, arguments(CORE, (2, 3), dtype=dtype), dtype, norm_eps=1.0)


@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning')
@pytest.mark.parametrize('extreme', ['underflow', 'tiny-steps', 'wide-range'])
def test_extreme_steps_and_decays(extreme, dtype, schedule):
    tensors = arguments(SCAN, (3, 6), dim=4, dtype=dtype)
    if extreme == 'underflow':
        tensors['dt_bias'] += 60
        tensors['A'] *= 1e3
    elif extreme == 'tiny-steps':
        tensors['dt_bias'] -= 15
        tensors['A'] *= 1e-3
    else:
        tensors['dt_bias'] *= 20
        tensors['A'] = -(10 ** (-tensors['A'] * 4 - 3))
    compare(SCAN, tensors, dtype)  # not numbers, and infinite ones, match nothing


def test_tiny_steps_in_half_precision(backend, schedule):
    """Whose sums with 1 would be 1 in fp32, on a map that makes them count."""
    tensors = arguments(SCAN, (3, 6), dim=4, dtype=torch.float16)
    tensors['x'], tensors['x_dbl'] = 32 * tensors['x'], 16 * tensors['x_dbl']
    tensors['dt_weight'], tensors['D'] = tensors['dt_weight'] / 16, 0 * tensors['D']
    tensors['dt_bias'] -= 17
    expected = oracles.ss2d_scan(**in_double(tensors))
    assert oracles.relative_error(ss2d_scan(**tensors).cpu(), expected) < 2e-3


@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning')
def test_states_without_input_stay_zero_whatever_they_grow_by(backend, schedule):
    """Even past all numbers within a chunk."""
    schedule(SMALL._replace(chunks=2))
    tensors = arguments(SCAN, (1, 128))
    tensors['A'] = torch.full_like(tensors['A'], 0.5)
    tensors['dt_bias'] = torch.full_like(tensors['dt_bias'], 3.0)
    tensors['x_dbl'] *= 1e-3
    tensors['x'].zero_()
    assert not ss2d_scan(**tensors).any()


TURNS = {
    'transposed': (lambda t: t.transpose(1, 2), [1, 0, 3, 2]),
    'by-half': (lambda t: t.flip(1, 2), [2, 3, 0, 1]),
}


@pytest.mark.parametrize('turn', TURNS)
def test_turning_the_map_swaps_the_routes(turn, dtype, schedule):
    """Transposed, rows and columns; by half, directions."""
    turn, order = TURNS[turn]
    tensors = arguments(SCAN, (2, 3), dim=5, dstate=2, dtype=dtype)
    turned = {k: tensors[k][order] for k in ('dt_weight', 'dt_bias', 'A', 'D')}
    turned['x'], turned['x_dbl'] = turn(tensors['x']), turn(tensors['x_dbl'])[:, :, :, order]
    actual, expected = turn(ss2d_scan(**turned)), ss2d_scan(**tensors)
    oracles.assert_matches(actual.cpu(), expected.cpu(), dtype)


def test_an_expanded_map(dtype, schedule):
    tensors = arguments(CORE, (2, 2), 2, dtype=dtype)
    tensors['x'] = tensors['x'][:1, :1].expand_as(tensors['x'])
    compare(CORE, tensors, dtype)
    assert ss2d_core(**tensors).is_contiguous()


def test_gradients_in_any_layout(backend, schedule):
    leaves = [t.requires_grad_() for t in arguments(SCAN, (2, 3)).values()]
    y = ss2d_scan(*leaves)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    actual = torch.autograd.grad(y, leaves, grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('elements,width,wide', [(1, 1, 1), (500, 62, 2**14), (2000, 250, 2**14)])
def test_chunks_of_any_size_in_plain_pytorch(elements, width, wide, monkeypatch):
    monkeypatch.setattr(chunked, '_CHUNK_ELEMENTS', elements)
    monkeypatch.setattr(chunked, '_CHUNK_WIDTH', width)
    monkeypatch.setattr(chunked, '_WIDE_STEP', wide)
    with use_triton(False):
        compare(SCAN, kernel_cases.ss2d_scan(size=(7, 11), dtype=torch.float64), torch.float64)


@pytest.mark.parametrize('size', [(2, 3), (5, 1)], ids='{0[0]}x{0[1]}'.format)
def test_the_naive_scan_agrees(size):
    tensors = in_double(kernel_cases.ss2d_scan(size=size))
    oracles.assert_all_match(run(naive.ss2d_scan, tensors), run(oracles.ss2d_scan, tensors), torch.float64)


@pytest.mark.parametrize('dstate', [1, 16])
def test_in_plain_pytorch_only_the_arguments_are_kept(dstate):
    """Neither the four routes' copies of the map nor states."""
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.ss2d_scan(size=(13, 11), dim=24, dstate=dstate).items()}
    kept = []
    with use_triton(False), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ss2d_scan(**leaves)
    assert {t.data_ptr() for t in kept if t.numel()} == {t.data_ptr() for t in leaves.values()}


@scan_and_core
def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(case, triton_kernels, schedule):
    leaves = {k: t.requires_grad_() for k, t in arguments(case, (3, 6), dim=3, dstate=2).items()}
    with Recorder() as keeping:
        y = case.function(**leaves)
    assert all(t.numel() for t in keeping.outputs[0][1:])
    with torch.no_grad(), Recorder() as forgetting:
        without_grad = case.function(**leaves)
    # The norm is compiled again where nothing is kept, and may be contracted otherwise.
    tolerance = dict(rtol=1e-6, atol=1e-6) if case is CORE else dict(rtol=0, atol=0)
    torch.testing.assert_close(without_grad, y, **tolerance)
    assert not any(t.numel() for t in forgetting.outputs[0][1:])


@triton.jit
def lines_of(tile_ptr, line_ptr, magic, tiles, BLOCK: tl.constexpr):
    """The lines of tiles, as the scans find them by a multiplication."""
    place = tl.arange(0, BLOCK)
    tl.store(line_ptr + place, line_of(tl.load(tile_ptr + place), magic, tiles))


@pytest.mark.parametrize('tiles', [1, 2, 3, 97, 62_500, 741_456, 1_000_000])
def test_lines_of_the_last_tiles_of_long_and_narrow_maps(tiles, triton_kernels):
    last = [min(lines * tiles + offset, 2**31 - 1) for lines in (1, 2, 3, 1000, 2000) for offset in (-1, 0, 1)]
    tile = torch.tensor([*last, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    sizes = Sizes(1, 16 * tiles, 1, 16, 1, 1)
    lines = torch.empty_like(tile)
    lines_of[(1,)](tile, lines, launch._magic_of(sizes, SMALL, False), tiles, len(tile))
    assert lines.tolist() == [t // tiles for t in tile.tolist()]


@needs_triton
@scan_and_core
def test_both_backends_count_the_same_operations(case, schedule):
    """Forward and backward."""
    totals = []
    for enabled in (False, True):
        leaves = {k: t.requires_grad_() for k, t in arguments(case, (2, 3)).items()}
        with use_triton(enabled), FlopCounterMode(display=False) as counter:
            case.function(**leaves).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@scan_and_core
@pytest.mark.parametrize('shape', [(6, 16), (2, 3, 5, 4, 16), (1, 0, 3, 16), (1, 3, 0, 16), (1, 2, 3, 0)], ids=str)
def test_what_is_no_map_is_an_error_that_shows_it(case, shape):
    tensors = {**arguments(case, (2, 3)), 'x': torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match='x must be') as error:
        case.function(**tensors)
    assert str(shape) in str(error.value)
