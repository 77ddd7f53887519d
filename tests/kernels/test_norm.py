"""The norms over channels against their float64 definitions, and within them the sum of a residual connection."""

from functools import partial

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, compare, in_double, run
from recorder import Recorder

from vmamba.kernels import layer_norm, norm

EPS = 1e-3

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')


@pytest.fixture(params=['rms_norm', 'layer_norm'])
def case(request):
    return CASES[request.param]


SHAPES = [
    pytest.param((2, 3), id='no-inner-dimension'),
    pytest.param((1, 1, 3), id='one-row'),
    pytest.param((2, 3, 2, 16), id='two-inner-dimensions'),
    pytest.param((4, 9, 64), id='more-rows-than-a-block'),
    pytest.param((3, 2, 257), id='dim257'),
    pytest.param((1, 3, 1000), id='dim1000'),
    pytest.param((1, 2, 2049), id='dim2049'),
    pytest.param((1, 2, 8192), id='dim8192'),
    pytest.param((0, 3, 16), id='no-sample'),
    pytest.param((2, 0, 16), id='no-row'),
]


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes(case, shape, dtype):
    compare(case, case.arguments(shape, dtype=dtype), dtype)


def test_one_channel(backend, dtype):
    """LayerNorm of which leaves the bias alone; RMSNorm leaves little but what eps takes, which must not be small."""
    compare(CASES['rms_norm'], kernel_cases.rms_norm((3, 5, 1), dtype), dtype, eps=1.0)
    tensors = kernel_cases.layer_norm((3, 5, 1), dtype)
    actual, expected = run(layer_norm, tensors), run(oracles.layer_norm, in_double(tensors))
    assert actual['result_0'].eq(tensors['bias'].cpu()).all()
    oracles.assert_matches(actual['grad_bias'], expected['grad_bias'], dtype)
    for name in ('grad_x', 'grad_weight'):
        assert not expected[name].any() and actual[name].abs().max() < 1e-4


@pytest.mark.parametrize('programs', [1, 3, 100])
def test_programs_of_the_backward_pass_that_walk_several_blocks(
    case, programs, triton_kernels, fresh_launches, monkeypatch
):
    """One that walks all rows, some of unequal numbers of rows, and one for each block."""
    monkeypatch.setattr(norm, '_WALKS', {norm._MAX_CHANNELS: norm._Walk(64, programs)})
    monkeypatch.setattr(norm, 'num_processors', lambda tensor: 1)
    compare(case, case.arguments((3, 7, 13)), torch.float32)


@pytest.mark.parametrize('dim,names', [(8192, ['norm']), (8193, [])])
def test_rows_that_are_too_long_for_the_kernels(case, dim, names, triton_kernels):
    tensors = case.arguments((1, dim))
    with Recorder() as calls:
        case.function(**tensors, eps=EPS)
    assert calls.names == names
    if not names:
        compare(case, tensors, torch.float32)


@pytest.mark.parametrize('optional', ['rb', 'r', 'b', ''], ids=['layer', 'rms', 'layer-first', 'rms-first'])
def test_the_norm_of_a_sum_and_the_sum(optional, backend, dtype):
    tensors = kernel_cases.add_norm(optional=optional, dtype=dtype)
    compare(CASES['add_norm'], tensors, dtype)
    out, summed = CASES['add_norm'].function(**tensors, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and summed.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize('eps', [1e-6, 0.1])
def test_eps(case, eps, dtype):
    """Of numbers so small that it counts."""
    tensors = case.arguments((2, 3, 5), dtype=dtype)
    tensors['x'] = torch.randn_like(tensors['x']) * 1e-2
    compare(case, tensors, dtype, eps=eps)


def test_a_large_mean_and_tiny_numbers(case, dtype):
    tensors = case.arguments(dtype=dtype)
    tensors['x'][0] = torch.randn_like(tensors['x'][0]) * 1e-6
    tensors['x'][1] += 100
    compare(case, tensors, dtype)


@pytest.mark.parametrize('out_dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes(case, dtype, out_dtype, backend):
    """As under autocast, whose output is what the next linear layer takes; gradients have their tensors' dtypes."""
    if backend and DEVICE == 'cpu' and out_dtype == torch.bfloat16:
        pytest.skip('raw bfloat16 is not interpreted as a GPU computes it')
    tensors = case.arguments(dtype=dtype)
    actual = run(case.function, tensors, eps=EPS, out_dtype=out_dtype)
    assert actual['result_0'].dtype == out_dtype
    assert all(actual[f'grad_{name}'].dtype == t.dtype for name, t in tensors.items())
    coarsest = max(dtype, out_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    oracles.assert_all_match(actual, run(case.definition, in_double(tensors), eps=EPS), coarsest)


@pytest.mark.parametrize('weight_dtype', [torch.float32, torch.float16], ids=str)
def test_the_result_has_the_weights_dtype_by_default(case, weight_dtype, backend):
    x, *parameters = case.arguments(dtype=torch.float16).values()
    parameters = [parameter.to(weight_dtype) for parameter in parameters]
    assert case.function(x, *parameters).dtype == weight_dtype


def test_gradients_in_any_layout(case, backend):
    leaves = [t.requires_grad_() for t in case.arguments().values()]
    out = case.function(*leaves)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, grad.mT.contiguous().mT)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters(case, dtype):
    """As of a model of which only a part is trained."""
    tensors = case.arguments(dtype=dtype)
    expected = run(case.definition, in_double(tensors), ['x'], **case.options)
    oracles.assert_all_match(run(case.function, tensors, ['x'], **case.options), expected, dtype)


@pytest.mark.parametrize('name,moments', [('rms_norm', 1), ('layer_norm', 2)])
def test_what_is_kept_is_the_input_and_a_number_or_two_a_row(name, moments, triton_kernels):
    tensors = {k: t.requires_grad_() for k, t in CASES[name].arguments(dtype=torch.float16).items()}
    function = CASES[name].function
    with Recorder() as keeping:
        y = function(**tensors)
    with torch.no_grad(), Recorder() as forgetting:
        function(**tensors)
    assert keeping.names == forgetting.names == ['norm']
    assert keeping.outputs[0][1].shape == (moments, 15) and not forgetting.outputs[0][1].numel()
    assert any(kept is not None and kept.data_ptr() == tensors['x'].data_ptr() for kept in y.grad_fn.saved_tensors)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(**tensors)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in tensors.values()) + moments * 15


class Norm(torch.nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.function, self.parameters_ = function, parameters

    def forward(self, x):
        return self.function(x, *self.parameters_)


def test_exported_graphs_hold_the_kernels(case, triton_kernels):
    x, *parameters = case.arguments().values()
    module = Norm(case.function, parameters)
    exported = torch.export.export(module, (x,))
    assert str(exported.graph).count('vmamba.norm.default') == 1
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_traced_graphs_hold_plain_operations(case, triton_kernels):
    x, *parameters = case.arguments().values()
    traced = torch.jit.trace(lambda x: case.function(x, *parameters), x)
    assert 'vmamba::' not in str(traced.graph)
    torch.testing.assert_close(traced(x), case.function(x, *parameters))


@pytest.mark.parametrize('shape', [(13,), (3, 5, 0), ()], ids=str)
def test_what_has_no_rows_of_channels_is_an_error_that_shows_it(case, shape):
    tensors = {**case.arguments(), 'x': torch.ones(shape, device=DEVICE)}
    with pytest.raises(ValueError, match='x must be') as error:
        case.function(**tensors)
    assert str(shape) in str(error.value)


def test_an_integer_output_is_an_error_that_shows_it(case):
    with pytest.raises(ValueError, match='out_dtype .* torch.int32'):
        case.function(**case.arguments(), out_dtype=torch.int32)


# What follows is within the branches of blocks only: the norm of residual + scale * x, with what they need of it.

ADDENDS = [
    pytest.param(True, True, id='add-scaled'),
    pytest.param(True, False, id='add'),
    pytest.param(False, True, id='start-scaled'),
    pytest.param(False, False, id='start'),
]


def summand_arguments(centred, shape=(3, 5, 13), dtype=torch.float32, residual=True, scale=True):
    """Arguments by name, absent ones None; half the samples are dropped."""
    maps = {'x': kernel_cases.randn(*shape)}
    parameters = {
        'weight': 1 + 0.3 * kernel_cases.randn(shape[-1]),
        'bias': kernel_cases.randn(shape[-1]) if centred else None,
        'residual': 3 + kernel_cases.randn(*shape) if residual else None,
        'scale': torch.arange(shape[0]) % 2 * 1.25 if scale else None,
    }
    return kernel_cases.place(maps, parameters, dtype)


def definition(x, weight, bias, residual, scale):
    """The normalised sum, that before weight and bias, and the sum."""
    total = x if scale is None else torch.stack([factor.item() * sample for factor, sample in zip(scale, x)])
    total = total if residual is None else residual + total
    one, zero = torch.ones_like(weight), torch.zeros_like(weight)
    normal = oracles.rms_norm(total, one, EPS) if bias is None else oracles.layer_norm(total, one, zero, EPS)
    return normal * weight + (zero if bias is None else bias), normal, total


def expected_results(tensors, grad_out, grad_summed):
    leaves = {k: t if t is None or k == 'scale' else t.requires_grad_() for k, t in in_double(tensors).items()}
    out, normal, summed = definition(**leaves)
    loss = (out * grad_out.cpu().double()).sum()
    loss = loss if grad_summed is None else loss + (summed * grad_summed.cpu().double()).sum()
    wanted = {k: t for k, t in leaves.items() if t is not None and k != 'scale'}
    grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))
    results = dict(out=out.detach(), normal=normal.detach(), summed=summed.detach())
    return {**results, **{f'grad_{k}': grad for k, grad in grads.items()}}


def actual_results(tensors, grad_out, grad_summed, save_normal):
    """By the kernels, forward and backward, with the same names."""
    x, weight, bias, residual, scale = tensors.values()
    summed = torch.empty_like(x, dtype=torch.float32)
    addends = dict(residual=residual, scale=scale, summed=summed)
    out, normal, moments = norm.norm_forward(
        x, weight, bias, EPS, grad_out.dtype, True, **addends, save_normal=save_normal
    )
    grad_x = torch.empty_like(x)
    grad_residual = None if residual is None else torch.empty_like(residual)
    saved = (normal if save_normal else summed), weight, moments, bias is not None, grad_x
    grads = grad_summed, grad_residual, scale
    sums = norm.norm_backward(grad_out, *saved, *grads, is_normal=save_normal)
    parameters = dict(zip(('grad_weight', 'grad_bias'), sums.sum(dim=0)))
    assert moments.shape == (2 if bias is not None and not save_normal else 1, x.numel() // x.shape[-1])
    results = dict(out=out, normal=normal, summed=summed, grad_x=grad_x, grad_residual=grad_residual, **parameters)
    return {k: t.cpu() for k, t in results.items() if t is not None}


@pytest.mark.parametrize('save_normal', [False, True], ids=['sum-saved', 'normal-saved'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('with_grad_summed', [True, False], ids=['both-used', 'normalised-used'])
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('centred', [False, True], ids=['rms', 'layer'])
def test_sums(centred, residual, scale, with_grad_summed, dtype, save_normal, triton_kernels):
    tensors = summand_arguments(centred, dtype=dtype, residual=residual, scale=scale)
    grad_out = torch.randn_like(tensors['x'])
    grad_summed = torch.randn(grad_out.shape, device=DEVICE) if with_grad_summed else None
    expected = expected_results(tensors, grad_out, grad_summed)
    actual = actual_results(tensors, grad_out, grad_summed, save_normal)
    if not save_normal:
        del expected['normal']
    oracles.assert_all_match(actual, expected, dtype)
    assert actual['out'].dtype == actual['grad_x'].dtype == dtype and actual['summed'].dtype == torch.float32


@pytest.mark.parametrize('centred', [False, True], ids=['rms', 'layer'])
@pytest.mark.parametrize('save_normal', [False, True], ids=['sum-saved', 'normal-saved'])
def test_sums_whose_samples_cross_blocks_of_rows(centred, save_normal, triton_kernels, fresh_launches, monkeypatch):
    monkeypatch.setattr(norm, '_BLOCK_ELEMENTS', 64)
    monkeypatch.setattr(norm, '_WALKS', {norm._MAX_CHANNELS: norm._Walk(64, 2)})
    monkeypatch.setattr(norm, 'num_processors', lambda tensor: 1)
    tensors = summand_arguments(centred, (4, 7, 13))
    grads = torch.randn_like(tensors['x']), torch.randn_like(tensors['x'])
    expected = expected_results(tensors, *grads)
    if not save_normal:
        del expected['normal']
    oracles.assert_all_match(actual_results(tensors, *grads, save_normal), expected, torch.float32)


@pytest.mark.parametrize('save_normal', [False, True])
def test_sums_of_which_nothing_is_kept(save_normal, triton_kernels):
    """The output is the same, and the sum need not be written."""
    x, weight, bias, residual, scale = summand_arguments(True).values()
    keep = partial(norm.norm_forward, x, weight, bias, EPS, torch.float32, residual=residual, scale=scale)
    out, normal, moments = keep(False, save_normal=save_normal)
    assert moments is None and (normal is not None) == save_normal
    expected, normal_too, moments = keep(True, save_normal=True, summed=torch.empty_like(x))
    # The kernel is compiled again where nothing is kept, and may be contracted otherwise.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    if save_normal:
        torch.testing.assert_close(normal, normal_too, rtol=1e-6, atol=1e-6)


def test_sums_of_half_precision_are_not_rounded(triton_kernels):
    x, weight, _, residual, _ = summand_arguments(False, dtype=torch.float16, scale=False).values()
    summed = torch.empty_like(residual)
    norm.norm_forward(x, weight, None, EPS, torch.float16, False, residual, summed=summed)
    assert torch.equal(summed, residual + x.float())


def test_the_sum_may_take_the_residuals_place(triton_kernels):
    """As in inference, where nothing else needs the residual."""
    x, weight, bias, residual, scale = summand_arguments(True).values()
    expected = torch.empty_like(residual)
    out, *_ = norm.norm_forward(x, weight, bias, EPS, torch.float32, False, residual, scale, expected)
    in_place, *_ = norm.norm_forward(x, weight, bias, EPS, torch.float32, False, residual, scale, residual)
    assert torch.equal(residual, expected) and torch.equal(in_place, out)
