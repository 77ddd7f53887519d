"""SS2D on its Triton kernels, against the float64 definition of `oracles`.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), on tiles of 16 steps by 16 channels.
"""

from functools import partial
from itertools import product

import oracles
import pytest
import test_ss2d
import torch
from recorder import Recorder
from test_ss2d import LAYOUTS
from vmamba.kernels import ss2d_core, ss2d_scan, use_triton

from vmamba.layers.ss2d import SS2D

pytest.importorskip('triton')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from vmamba.kernels.fused import ss2d_operator  # noqa: E402
from vmamba.kernels.fused.routes import line_of  # noqa: E402
from vmamba.kernels.fused.ss2d_plan import Launch, Plan, Sizes, plan, states_shape  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TILE = Launch(rows=8, splits=2, channels=16, regions=1)

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_triton(True):
        yield


@pytest.fixture
def launch(monkeypatch):
    """Sets the launches of both passes, which are the same unless they are given separately."""

    def set_launches(forward=TILE, backward=None):
        plan = Plan(forward, backward or forward)
        monkeypatch.setattr(ss2d_operator, 'plan', lambda sizes, processors: plan)

    set_launches()
    return set_launches


def arguments(size=(5, 4), batch=1, dim=16, dstate=1, dt_rank=3, dtype=torch.float32, norm=False):
    """Arguments of `ss2d_scan`, or with a norm of `ss2d_core`, by name."""
    tensors = test_ss2d.arguments(size, batch, dim, dstate, dt_rank, dtype)
    if norm:
        projections = tensors.pop('x_dbl').shape[3:].numel()
        projection = torch.randn(projections, dim, dtype=torch.float64) * dim**-0.5 / 2
        tensors = {'x': tensors.pop('x'), 'x_proj_weight': projection.to(tensors['D'].dtype), **tensors}
        weight, bias = 1 + 0.3 * torch.randn(dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
        tensors |= {'norm_weight': weight.to(tensors['D'].dtype), 'norm_bias': bias.to(tensors['D'].dtype)}
    return {k: t.to(DEVICE) for k, t in tensors.items()}


def library(**tensors):
    return ss2d_core(**tensors, norm_eps=1e-3) if 'norm_weight' in tensors else ss2d_scan(**tensors)


def definition(
    x,
    x_proj_weight=None,
    x_dbl=None,
    norm_weight=None,
    norm_bias=None,
    scan=oracles.ss2d_scan,
    dtype=None,
    **parameters,
):
    """In float64, but for projections that are made in `dtype`."""
    if x_dbl is None:
        x_dbl = (x @ x_proj_weight.T).unflatten(-1, (4, -1))
        x_dbl = x_dbl + (x_dbl.to(dtype) - x_dbl).detach()
    y = scan(x, x_dbl, **parameters)
    return y if norm_weight is None else oracles.layer_norm(y, norm_weight, norm_bias, 1e-3)


def run(tensors, function=library):
    """Output and gradients by name, on the CPU."""
    return {k: t.cpu() for k, t in test_ss2d.run(function, tensors).items()}


def compare(tensors, dtype=torch.float32):
    actual = run(tensors)
    expected = run({k: t.cpu().double() for k, t in tensors.items()}, partial(definition, dtype=tensors['x'].dtype))
    oracles.assert_all_match(actual, expected, dtype)
    assert actual['y'].dtype == tensors['x'].dtype
    for name, tensor in tensors.items():
        assert actual[f'grad_{name}'].dtype == tensor.dtype, name


MAPS = [
    pytest.param(dict(size=(1, 1)), id='pixel'),
    pytest.param(dict(size=(1, 1), norm=True, dim=3), id='pixel-norm-dim3'),
    pytest.param(dict(size=(1, 19)), id='row'),
    pytest.param(dict(size=(1, 35), dstate=2), id='long-row-n2'),
    pytest.param(dict(size=(19, 1)), id='column'),
    pytest.param(dict(size=(16, 1), norm=True), id='column-of-a-tile'),
    pytest.param(dict(size=(5, 4), norm=True), id='tiles-cross-columns'),
    pytest.param(dict(size=(3, 11), dstate=3), id='tiles-cross-columns-n3'),
    pytest.param(dict(size=(14, 3), norm=True), id='tiles-end-with-columns'),
    pytest.param(dict(size=(15, 2), dstate=3), id='tiles-end-with-columns-n3'),
    pytest.param(dict(size=(2, 5), dstate=16, dim=4), id='n16'),
    pytest.param(dict(size=(3, 3), dim=33, norm=True), id='dim33-norm'),
    pytest.param(dict(size=(3, 3), dim=40, dstate=2), id='dim40-n2'),
    pytest.param(dict(size=(2, 3), dim=1, dt_rank=1), id='dim1-rank1'),
    pytest.param(dict(size=(2, 3), dt_rank=17), id='rank17'),
    pytest.param(dict(size=(2, 3), batch=3, norm=True), id='batch3'),
]


@pytest.mark.parametrize('sizes', MAPS)
def test_outputs_and_gradients(sizes, launch):
    compare(arguments(**sizes))


# The tiles of the backward pass are those of the forward pass, or what a thread walks of one.
LAUNCHES = [
    pytest.param(Launch(16, 1, 16, 1), None, dict(size=(3, 11), dstate=2), id='one-split'),
    pytest.param(Launch(4, 4, 16, 1), None, dict(size=(14, 3)), id='four-splits'),
    pytest.param(Launch(8, 2, 32, 1), None, dict(size=(3, 3), dim=40), id='channels-32'),
    pytest.param(Launch(16, 2, 16, 1), Launch(8, 2, 16, 1), dict(size=(27, 5)), id='half-tiles'),
    pytest.param(
        Launch(16, 2, 16, 1), Launch(16, 1, 16, 1), dict(size=(9, 5), dstate=2), id='half-tiles-cross-columns'
    ),
    pytest.param(Launch(16, 4, 16, 1), Launch(4, 4, 16, 1), dict(size=(11, 7)), id='quarter-tiles'),
    pytest.param(Launch(8, 2, 16, 2), None, dict(size=(9, 7), dstate=2), id='two-regions'),
    pytest.param(Launch(8, 2, 16, 3), None, dict(size=(15, 5)), id='three-regions'),
    pytest.param(Launch(8, 2, 16, 5), None, dict(size=(1, 35), dim=3), id='fewer-tiles-than-regions'),
    pytest.param(Launch(16, 2, 16, 2), Launch(16, 1, 16, 4), dict(size=(1, 70)), id='half-tiles-in-more-regions'),
    pytest.param(TILE, TILE._replace(batches=2), dict(size=(3, 3), batch=3, dstate=2), id='batches'),
    pytest.param(
        TILE._replace(regions=2),
        TILE._replace(regions=2, batches=2),
        dict(size=(5, 7), batch=3, dim=20),
        id='batches-regions',
    ),
]


@pytest.mark.parametrize('forward,backward,sizes', LAUNCHES)
def test_launches(forward, backward, sizes, launch):
    launch(forward, backward)
    compare(arguments(**sizes))


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_half_precision(norm, launch):
    launch(TILE._replace(regions=2))
    compare(arguments((7, 5), dim=13, dtype=torch.float16, norm=norm), torch.float16)


@pytest.mark.parametrize(
    'wide', [['x_proj_weight'], ['dt_weight', 'norm_weight'], []], ids=lambda names: '-'.join(names) or '-'
)
def test_mixed_dtypes(wide, launch):
    """As under autocast, and as in a model that is in half precision as a whole."""
    tensors = {k: t.half() for k, t in arguments((2, 3), norm=True).items()}
    compare({k: t.float() if k in wide else t for k, t in tensors.items()}, torch.float16)


@pytest.mark.filterwarnings('ignore:overflow:RuntimeWarning')
@pytest.mark.parametrize('case', ['underflow', 'tiny-steps', 'wide-range'])
def test_extreme_steps_and_decays(case, launch):
    launch(TILE._replace(regions=2))
    tensors = arguments((5, 7), dim=4)
    if case == 'underflow':
        tensors['dt_bias'] = tensors['dt_bias'] + 60
        tensors['A'] = tensors['A'] * 1e3
    elif case == 'tiny-steps':
        tensors['dt_bias'] = tensors['dt_bias'] - 15
        tensors['A'] = tensors['A'] * 1e-3
    else:
        tensors['dt_bias'] = tensors['dt_bias'] * 20
        tensors['A'] = -(10 ** (-tensors['A'] * 4 - 3))
    compare(tensors)


def test_tiny_steps_in_half_precision(launch):
    """Whose sums with 1 would be 1 in fp32, on a map that makes them count."""
    tensors = arguments((5, 7), dim=4, dtype=torch.float16)
    tensors['x'], tensors['x_dbl'] = 32 * tensors['x'], 16 * tensors['x_dbl']
    tensors['dt_weight'] = tensors['dt_weight'] / 16
    tensors['dt_bias'], tensors['D'] = tensors['dt_bias'] - 17, 0 * tensors['D']
    expected = run({k: t.cpu().double() for k, t in tensors.items()}, definition)
    assert oracles.relative_error(run(tensors)['y'], expected['y']) < 2e-3


def test_the_launches_that_are_chosen():
    compare(arguments((7, 9), 2, dim=33, norm=True))


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_an_empty_batch(norm):
    compare(arguments((2, 3), batch=0, norm=norm))


@pytest.mark.parametrize('size', [(1, 1), (7, 7), (56, 56), (4096, 1), (1, 4096), (512, 512)], ids=str)
def test_chosen_launches_fit_together(size):
    for batch, dim, dstate, processors in product((0, 1, 64), (1, 33, 96, 768), (1, 16), (1, 20, 132)):
        sizes = Sizes(batch, *size, dim, 6, dstate)
        forward, backward = chosen = plan(sizes, processors)
        assert forward.steps == backward.steps or forward.rows == backward.steps
        for launch in forward, backward:
            assert launch.steps >= 16 and launch.channels % 16 == 0
            assert min(launch.regions, launch.batches, launch.warps) >= 1
        unused = states_shape(sizes, chosen)[2] * backward.steps - size[0] * size[1]
        assert unused < max(backward.steps, 0.21 * size[0] * size[1]), 'tiles are nearly full'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_memory_layout_does_not_matter(layout, launch):
    tensors = arguments((3, 5), 2, norm=True)
    expected = run(tensors)
    leaves = {k: LAYOUTS[layout](t).requires_grad_() for k, t in tensors.items()}
    assert not leaves['x'].is_contiguous()
    y = library(**leaves)
    assert y.is_contiguous()
    torch.manual_seed(1)
    y.backward(LAYOUTS[layout](torch.randn(y.shape, dtype=torch.float64).to(torch.bfloat16).to(y)))
    assert oracles.relative_error(y.cpu(), expected['y']) < 1e-6
    for name, leaf in leaves.items():
        assert oracles.relative_error(leaf.grad.cpu(), expected[f'grad_{name}']) < 1e-6, name


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_an_expanded_map_and_gradient(norm, launch):
    tensors = arguments((2, 3), 2, norm=norm)
    tensors['x'] = tensors['x'][:1, :1].expand_as(tensors['x'])
    actual = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    expected = {k: t.detach().cpu().double().requires_grad_() for k, t in tensors.items()}
    library(**actual).sum().backward()
    definition(**expected, dtype=torch.float32).sum().backward()
    for name in tensors:
        oracles.assert_matches(actual[name].grad.cpu(), expected[name].grad, torch.float32, name)


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(norm, launch):
    launch(Launch(16, 2, 16, 2), Launch(16, 1, 16, 2))
    tensors = arguments((9, 9), dim=3, dstate=2, norm=norm)
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    with Recorder() as keeping:
        y = library(**leaves)
    kept = keeping.outputs[0][1:]
    assert [t.numel() > 0 for t in kept] == [norm, norm, True, norm]
    with torch.no_grad(), Recorder() as no_grad:
        without_grad = library(**leaves)
    with Recorder() as constants:
        of_constants = library(**tensors)
    # The norm is compiled anew where nothing is kept, and may be contracted otherwise.
    same = dict(rtol=1e-6, atol=1e-6) if norm else dict(rtol=0, atol=0)
    torch.testing.assert_close(without_grad, y, **same)
    torch.testing.assert_close(of_constants, y, **same)
    for recorder in no_grad, constants:
        assert not any(t.numel() for t in recorder.outputs[0][1:])


@pytest.mark.parametrize('name', ['x_proj_weight', 'D', 'norm_bias'])
def test_one_gradient_alone(name, launch):
    tensors = arguments((2, 3), norm=True)
    expected = run(tensors)[f'grad_{name}']
    alone = run({name: tensors[name]}, lambda **leaf: library(**{**tensors, **leaf}))[f'grad_{name}']
    assert torch.equal(alone, expected)


def test_two_runs_are_equal_bit_by_bit(launch):
    """What is read without having been written, or beyond its end, would not be."""
    launch(TILE._replace(regions=2))
    tensors = arguments((3, 11), dim=5, dtype=torch.float16, norm=True)
    first, second = run(tensors), run(tensors)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_inputs_are_left_alone(launch):
    tensors = arguments((1, 1), norm=True)
    copies = {k: t.clone() for k, t in tensors.items()}
    run(tensors)
    library(**tensors).zero_()
    assert all(torch.equal(t, copies[k]) for k, t in tensors.items())


@triton.jit
def lines_of(tile_ptr, line_ptr, magic, tiles, BLOCK: tl.constexpr):
    """The lines of tiles, as the scans find them by a multiplication."""
    place = tl.arange(0, BLOCK)
    tl.store(line_ptr + place, line_of(tl.load(tile_ptr + place), magic, tiles))


@pytest.mark.parametrize('tiles', [1, 2, 3, 97, 62_500, 741_456, 1_000_000])
def test_lines_of_the_last_tiles_of_long_and_narrow_maps(tiles):
    last = [min(lines * tiles + offset, 2**31 - 1) for lines in (1, 2, 3, 1000, 2000) for offset in (-1, 0, 1)]
    tile = torch.tensor([*last, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    magic = -(-(2**32) // tiles) if tiles > 1 else 0
    lines = torch.empty_like(tile)
    lines_of[(1,)](tile, lines, magic - 2**32 if magic >= 2**31 else magic, tiles, len(tile))
    assert lines.tolist() == [t // tiles for t in tile.tolist()]


def operator_arguments(tensors):
    """The tensor arguments of the operator, in its order."""
    names = ('x', 'x_dbl', 'x_proj_weight', 'dt_weight', 'dt_bias', 'A', 'D', 'norm_weight', 'norm_bias')
    return [tensors.get(name) for name in names]


@pytest.mark.parametrize('keep', [False, True], ids=['forgetting', 'keeping'])
@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_registration(dtype, norm, keep, launch):
    """Of what is kept, too, shapes and dtypes are known without a run."""
    launch(Launch(16, 2, 16, 2), Launch(16, 1, 16, 2))
    tensors = {k: t.requires_grad_(keep) for k, t in arguments((3, 7), dtype=dtype, norm=norm).items()}
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    options = *operator_arguments(tensors), 1e-5, keep
    torch.library.opcheck(torch.ops.vmamba.ss2d_fused.default, options, test_utils=checks)


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_registration_of_the_backward_pass(norm, launch):
    x, x_dbl, *tensors, norm_bias = operator_arguments(arguments((3, 7), dtype=torch.float16, norm=norm))
    out, projected, *kept = torch.ops.vmamba.ss2d_fused(x, x_dbl, *tensors, norm_bias, 1e-5, True)
    args = torch.randn_like(out), x, projected if norm else x_dbl, *tensors, *kept
    checks = ('test_schema', 'test_faketensor')
    torch.library.opcheck(torch.ops.vmamba.ss2d_fused_backward.default, args, test_utils=checks)


def test_gradients_of_what_kept_nothing_are_an_error(launch):
    leaves = {k: t.requires_grad_() for k, t in arguments((2, 3), norm=True).items()}
    out, *_ = torch.ops.vmamba.ss2d_fused(*operator_arguments(leaves), 1e-5, False)
    with pytest.raises(RuntimeError, match='keep=True'):
        out.sum().backward()


@pytest.mark.parametrize('name', ['norm_weight', 'norm_bias'])
@pytest.mark.parametrize('shape', [(15,), (1, 16), ()], ids=str)
@pytest.mark.parametrize('plain', [False, True], ids=['triton', 'plain'])
def test_a_bad_norm_is_an_error_that_shows_it(name, shape, plain):
    tensors = {**arguments((1, 1), norm=True), name: torch.ones(shape, device=DEVICE)}
    with use_triton(not plain), pytest.raises(ValueError, match=name) as caught:
        library(**tensors)
    assert str(shape) in str(caught.value) and '[16]' in str(caught.value)


@pytest.mark.parametrize('name,shape', [('x', (6, 16)), ('dt_bias', (64,)), ('A', (4, 15, 1)), ('D', (64,))])
@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_a_bad_argument_is_an_error_that_shows_it(name, shape, norm):
    tensors = {**arguments((2, 3), norm=norm), name: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match=name) as caught:
        library(**tensors)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize('plain', [False, True], ids=['triton', 'plain'])
@pytest.mark.parametrize('name,shape', [('x_dbl', (1, 2, 3, 4, 6)), ('x_proj_weight', (4, 5, 16))])
def test_bad_projections_are_an_error_that_shows_them(name, shape, plain):
    tensors = {**arguments((2, 3), norm=name == 'x_proj_weight'), name: torch.zeros(shape, device=DEVICE)}
    with use_triton(not plain), pytest.raises(ValueError, match=name) as caught:
        library(**tensors)
    assert str(shape) in str(caught.value)


def layer_and_map():
    layer = SS2D(16, ssm_ratio=1.0).to(DEVICE)
    return layer, torch.randn(1, 4, 5, 16, device=DEVICE)


def outputs_and_gradients(layer, forward, x):
    x = x.clone().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def test_a_layer_compiles_in_one_graph(launch):
    torch.compiler.reset()
    layer, x = layer_and_map()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for actual, expected in zip(outputs_and_gradients(layer, compiled, x), outputs_and_gradients(layer, layer, x)):
        assert oracles.relative_error(actual, expected) < 1e-5


def on_gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    return pytest.mark.gpu(skip(test))


def compare_with_plain(tensors, dtype):
    """With the plain path in float64 on the GPU, for maps that the definition would take too long for."""
    with use_triton(False):
        plain = partial(definition, scan=ss2d_scan, dtype=dtype)
        expected = run({k: t.double() for k, t in tensors.items()}, plain)
    actual = run(tensors)
    oracles.assert_all_match(actual, expected, dtype, outliers=0.0 if dtype == torch.float32 else 1e-3)
    return actual


STAGES = [
    dict(size=(56, 56), dim=96, dt_rank=6),
    dict(size=(28, 28), dim=192, dt_rank=12),
    dict(size=(14, 14), dim=384, dt_rank=24),
    dict(size=(7, 7), dim=768, dt_rank=48),
    dict(size=(28, 28), dim=96, dt_rank=6, dstate=16),
]
OTHERS = [
    dict(size=(4096, 1), dim=48),
    dict(size=(1, 4096), dim=33, dstate=2),
    dict(size=(512, 512), dim=32),
    dict(size=(200, 333), dim=40, dstate=3),
]


@on_gpu
@pytest.mark.parametrize('dt_rank', [1, 2], ids=['apart', 'one-word'])
def test_coefficients_in_bfloat16(dt_rank, launch):
    """B and C of a position are loaded as one word where they are one; the interpreter takes no products of bf16."""
    launch(TILE._replace(regions=2))
    compare(arguments((7, 5), dim=13, dtype=torch.bfloat16, dt_rank=dt_rank, norm=True), torch.bfloat16)


@on_gpu
def test_projections_that_begin_between_words():
    tensors = arguments((7, 5), dim=13, dtype=torch.bfloat16, dt_rank=2)
    x_dbl = tensors['x_dbl']
    shifted = torch.empty(x_dbl.numel() + 1, dtype=x_dbl.dtype, device=DEVICE)[1:].view(x_dbl.shape).copy_(x_dbl)
    outputs, gradients = [], []
    for leaf in x_dbl, shifted:
        outputs.append(library(**{**tensors, 'x_dbl': leaf.requires_grad_()}))
        gradients += torch.autograd.grad(outputs[-1].float().square().sum(), leaf)
    assert torch.equal(*outputs) and torch.equal(*gradients)


@on_gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('sizes', STAGES, ids=str)
def test_stages_of_vmamba(sizes, batch, dtype):
    compare_with_plain(arguments(**sizes, batch=batch, dtype=dtype, norm=True), dtype)


def test_states_that_grow_past_all_numbers_in_a_region(launch):
    """States without input stay zero, whatever they grow by."""
    launch(TILE._replace(regions=4))
    tensors = arguments((1, 256), dim=16)
    tensors['A'] = torch.full_like(tensors['A'], 0.5)
    tensors['dt_bias'] = torch.full_like(tensors['dt_bias'], 3.0)
    tensors['x_dbl'] *= 1e-3
    tensors['x'].zero_()
    assert not library(**tensors).any()


@on_gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('sizes', OTHERS, ids=str)
def test_large_maps(sizes, dtype):
    compare_with_plain(arguments(**sizes, dtype=dtype), dtype)


@on_gpu
def test_states_beyond_32_bits():
    size, dim, dstate = (4096, 4096), 128, 16  # 2^33 numbers of states
    x = torch.randn(1, *size, dim, dtype=torch.bfloat16, device=DEVICE)
    x_dbl = torch.randn(1, *size, 4, 1 + 2 * dstate, dtype=torch.bfloat16, device=DEVICE)
    dt_weight, dt_bias, D = (torch.randn(4, dim, *n, device=DEVICE) for n in ((1,), (), ()))
    parameters = dict(dt_weight=dt_weight, dt_bias=dt_bias, A=-torch.rand(4, dim, dstate, device=DEVICE), D=D)
    forgetting = ss2d_scan(x, x_dbl, **parameters)
    keeping = ss2d_scan(x.requires_grad_(), x_dbl, **parameters)
    assert keeping.requires_grad and torch.equal(keeping, forgetting)


@on_gpu
@pytest.mark.parametrize('sizes', STAGES[::2] + OTHERS[2:3], ids=str)
def test_repeated_runs_are_equal_bit_by_bit(sizes):
    tensors = arguments(**sizes, batch=2, dtype=torch.bfloat16, norm=True)
    first = run(tensors)
    for _ in range(5):
        again = run(tensors)
        assert all(torch.equal(first[k], again[k]) for k in first)


@on_gpu
@torch.inference_mode()
def test_replays_in_a_cuda_graph():
    tensors = arguments((14, 14), dim=96, dtype=torch.bfloat16, norm=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        library(**tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = library(**tensors)
    tensors['x'].copy_(torch.randn_like(tensors['x']))
    graph.replay()
    assert torch.equal(captured, library(**tensors))


@on_gpu
def test_a_layer_compiles_with_inductor():
    torch.compiler.reset()
    layer, x = layer_and_map()
    compiled = torch.compile(layer, fullgraph=True)
    for actual, expected in zip(outputs_and_gradients(layer, compiled, x), outputs_and_gradients(layer, layer, x)):
        assert oracles.relative_error(actual, expected) < 1e-3


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_a_device_that_is_not_the_current_one():
    tensors = arguments((14, 14), dim=40, norm=True)
    expected = run(tensors)
    assert torch.cuda.current_device() == 0
    actual = run({k: t.to('cuda:1') for k, t in tensors.items()})
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
