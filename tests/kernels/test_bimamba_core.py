"""The core of bidirectional Mamba, plain and on its Triton kernels, against float64 loops.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), where raw bfloat16 is not computed as on a GPU.
"""

import importlib.util

import oracles
import pytest
import test_bidirectional
import test_conv
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from vmamba.kernels import bimamba_core, use_triton

HAS_GPU = torch.cuda.is_available()
DEVICE = 'cuda' if HAS_GPU else 'cpu'
HAS_TRITON = importlib.util.find_spec('triton') is not None
NAMES = ('xz', 'conv_weight', 'conv_bias', 'x_proj_weight', 'dt_weight', 'dt_bias', 'A', 'D')
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='needs the package triton')


@pytest.fixture(params=[False, pytest.param(True, marks=needs_triton)], ids=['plain', 'triton'])
def backend(request):
    with use_triton(request.param):
        yield


@pytest.fixture
def triton_kernels():
    with use_triton(True):
        yield


def arguments(batch=2, seqlen=9, dim=5, dstate=3, dt_rank=2, width=4, dtype=torch.float32):
    wide = torch.promote_types(dtype, torch.float32)
    projections = dt_rank + 2 * dstate
    shapes = (
        (batch, seqlen, 2 * dim),
        (2, dim, width),
        (2, dim),
        (2, projections, dim),
        (2, dim, dt_rank),
        (2, dim),
        (2, dim, dstate),
        (2, dim),
    )
    tensors = dict(zip(NAMES, (torch.randn(shape, dtype=torch.float64) for shape in shapes)))
    # As in a model, where steps stay small: sums over the state are then no worse conditioned than their terms.
    tensors['x_proj_weight'] *= (3 / dim) ** 0.5
    tensors['dt_weight'] *= dt_rank**-0.5
    tensors['dt_bias'] -= 2
    tensors['A'] = -tensors['A'].abs()
    return {k: t.to(dtype if k == 'xz' else wide) for k, t in tensors.items()}


def loop(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D):
    x, z = xz.chunk(2, dim=-1)
    u = F.silu(test_conv.loop(x, conv_weight, conv_bias))
    x_dbl = torch.einsum('blkd,kpd->blkp', u, x_proj_weight)
    return test_bidirectional.loop(u, x_dbl, dt_weight, dt_bias, A, D) / 2 * F.silu(z)


def run(function, tensors):
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    out = function(**leaves)
    torch.manual_seed(1)
    # Gradients of long sequences shall not leave the range of fp16.
    weight = torch.randn(out.shape, dtype=torch.float64).to(torch.bfloat16) / 16
    out.backward(weight.to(out))
    return {'out': out.detach().cpu(), **{f'grad_{k}': t.grad.cpu() for k, t in leaves.items()}}


def on_device(tensors):
    return {k: t.to(DEVICE) for k, t in tensors.items()}


def check(tensors, dtype):
    expected = run(loop, {k: t.double() for k, t in tensors.items()})
    oracles.assert_all_match(run(bimamba_core, on_device(tensors)), expected, dtype)


SIZES = [
    pytest.param(dict(), id='small'),
    pytest.param(dict(seqlen=1, dstate=1, dt_rank=1), id='one-step'),
    pytest.param(dict(batch=1, seqlen=1), id='one-step-of-one-sequence'),
    pytest.param(dict(seqlen=16, dstate=4, dt_rank=8), id='tile'),
    pytest.param(dict(seqlen=17, dstate=16, dt_rank=3, batch=1), id='n16'),
    pytest.param(dict(seqlen=2, width=2), id='two-taps'),
    pytest.param(dict(seqlen=35, dim=33, batch=1, dstate=2), id='two-blocks-of-channels'),
]


@pytest.mark.parametrize('sizes', SIZES)
def test_outputs_and_gradients(sizes, backend):
    check(arguments(**sizes), torch.float32)


@needs_triton
def test_half_precision(triton_kernels):
    check(arguments(dtype=torch.float16, seqlen=20), torch.float16)


@needs_triton
@pytest.mark.parametrize('chunks', [2, 3])
def test_chunks_of_the_sequence(chunks, triton_kernels, monkeypatch):
    from vmamba.kernels.fused.columns import launch

    monkeypatch.setattr(launch, 'CONFIG', launch.CONFIG._replace(chunks=chunks))
    check(arguments(seqlen=50, batch=1), torch.float32)


def test_steps_that_lie_far_apart(backend):
    """A tensor of one step counts as contiguous, whatever its stride along the sequence."""
    tensors = on_device(arguments(batch=3, seqlen=1))
    expected = run(bimamba_core, tensors)
    apart = torch.full((1, 40, tensors['xz'].shape[-1]), float('nan'), device=DEVICE)
    xz = apart[:, :3].transpose(0, 1)
    xz.copy_(tensors['xz'])
    assert torch.equal(bimamba_core(**{**tensors, 'xz': xz}).cpu(), expected['out'])


def test_more_taps_than_the_kernels_take(backend):
    check(arguments(width=5), torch.float32)


def test_an_empty_batch(backend):
    tensors = {k: t.requires_grad_() for k, t in on_device(arguments(batch=0)).items()}
    out = bimamba_core(**tensors)
    out.sum().backward()
    assert out.shape == (0, 9, 5) and not tensors['A'].grad.any()


def test_without_a_state_the_skip_connection_is_left(backend):
    tensors = arguments(dstate=0)
    results = run(bimamba_core, on_device(tensors))
    x, z = tensors['xz'].double().chunk(2, dim=-1)
    u = F.silu(test_conv.loop(x, tensors['conv_weight'].double(), tensors['conv_bias'].double()))
    expected = (tensors['D'].double() * u).sum(dim=2) / 2 * F.silu(z)
    assert oracles.relative_error(results['out'], expected) < 1e-5
    assert results['grad_D'].all() and not results['grad_dt_weight'].any()


def test_inference_gives_the_same(backend):
    tensors = on_device(arguments(seqlen=20))
    with torch.no_grad():
        out = bimamba_core(**tensors)
    assert torch.equal(out, bimamba_core(**{k: t.requires_grad_() for k, t in tensors.items()}))


def test_the_input_stays_as_it_is(backend):
    tensors = on_device(arguments())
    before = {k: t.clone() for k, t in tensors.items()}
    run(bimamba_core, tensors)
    assert all(torch.equal(tensors[k], before[k]) for k in before)


def test_memory_layout_does_not_matter(backend):
    tensors = arguments()
    expected = run(loop, {k: t.double() for k, t in tensors.items()})
    strided = {k: t.permute(*reversed(range(t.ndim))).contiguous() for k, t in on_device(tensors).items()}
    out = bimamba_core(**{k: t.permute(*reversed(range(t.ndim))) for k, t in strided.items()})
    oracles.assert_matches(out.cpu(), expected['out'], torch.float32)


@needs_triton
@pytest.mark.parametrize('keep', [False, True])
def test_registration_of_the_operators(keep):
    tensors = tuple(t.requires_grad_() for t in on_device(arguments()).values())
    utilities = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(torch.ops.vmamba.bimamba_fused.default, (*tensors, keep), test_utils=utilities)
    if keep:
        inputs = [t.detach() for t in tensors]
        out, *kept = torch.ops.vmamba.bimamba_fused(*inputs, True)
        arguments_ = (torch.ones_like(out), *inputs, *kept)
        torch.library.opcheck(torch.ops.vmamba.bimamba_fused_backward.default, arguments_, test_utils=utilities)


@needs_triton
def test_both_paths_count_the_same_operations():
    totals = []
    for enabled in (False, True):
        tensors = {k: t.requires_grad_() for k, t in on_device(arguments()).items()}
        with use_triton(enabled), FlopCounterMode(display=False) as counter:
            bimamba_core(**tensors).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    'name,shape',
    [
        ('xz', (9, 10)),
        ('xz', (2, 9, 11)),
        ('xz', (2, 0, 10)),
        ('conv_weight', (2, 5)),
        ('conv_weight', (2, 5, 0)),
        ('conv_bias', (5,)),
        ('x_proj_weight', (2, 7, 5)),
        ('D', (1, 5)),
    ],
)
def test_a_bad_shape_is_an_error_that_shows_it(name, shape):
    with pytest.raises(ValueError, match=f'^{name} must be .*{str(shape)[1:-1]}'):
        bimamba_core(**{**arguments(), name: torch.randn(shape)})


gpu = pytest.mark.skipif(not HAS_GPU, reason='needs a GPU')


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    'sizes',
    [
        dict(batch=2, seqlen=197, dim=384, dstate=16, dt_rank=12),
        dict(batch=1, seqlen=1025, dim=40, dstate=5, dt_rank=7),
        dict(batch=1, seqlen=6085, dim=96, dstate=16, dt_rank=12),
        dict(batch=3, seqlen=64, dim=256, dstate=64, dt_rank=24, width=3),
    ],
    ids=str,
)
def test_sizes_on_a_gpu(sizes, dtype):
    """Against the plain path in float64, for sizes that the loops would take too long for.

    Half precision rounds what lies between the projections and the scans: as much as on the plain path.
    """
    tensors = on_device(arguments(**sizes, dtype=dtype))
    with use_triton(False):
        expected = run(bimamba_core, {k: t.double() for k, t in tensors.items()})
        plain = run(bimamba_core, tensors)
    first = run(bimamba_core, tensors)
    if dtype == torch.float32:
        oracles.assert_all_match(first, expected, dtype)
    for name, value in expected.items():
        error, of_plain = ((t[name].double() - value).norm() / value.norm() for t in (first, plain))
        assert error < max(2 * of_plain, 1e-5), name
    again = run(bimamba_core, tensors)
    assert all(torch.equal(first[k], again[k]) for k in first)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
def test_one_step_on_a_gpu(dtype):
    """Triton makes constants of sizes that are 1. Half precision is exact enough for a single step."""
    check(arguments(batch=1, seqlen=1, dim=16, dstate=4), dtype)


@gpu
@pytest.mark.gpu
def test_compiles_without_a_graph_break():
    tensors = on_device(arguments(seqlen=100, dim=64, dstate=16))
    expected = run(bimamba_core, tensors)
    actual = run(torch.compile(bimamba_core, fullgraph=True), tensors)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
