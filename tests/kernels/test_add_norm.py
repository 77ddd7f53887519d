"""Residual connection and norm, plain and on the Triton kernels, against the float64 definition of `oracles`.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

import oracles
import pytest
import torch
from recorder import Recorder
from vmamba.kernels import add_layer_norm, add_norm, add_rms_norm, layer_norm, use_triton
from vmamba.kernels.backend import triton

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EPS = 1e-3
NORMS = ['rms', 'layer']
needs_triton = pytest.mark.skipif(triton is None, reason='needs the package triton')
BACKENDS = [pytest.param(False, id='plain'), pytest.param(True, id='triton', marks=needs_triton)]

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')


def arguments(norm='rms', shape=(3, 5, 13), dtype=torch.float32, residual=True, scale=True, weight_dtype=None):
    """Tensor arguments by name; half the samples are dropped."""
    wide, weight_dtype = torch.promote_types(dtype, torch.float32), weight_dtype or dtype
    tensors = {
        'x': torch.randn(shape).to(dtype),
        'residual': 3 + torch.randn(shape).to(wide) if residual else None,
        'weight': (1 + 0.3 * torch.randn(shape[-1])).to(weight_dtype),
        'bias': torch.randn(shape[-1]).to(weight_dtype),
        'scale': (torch.arange(shape[0]) % 2 * 1.25).to(wide) if scale else None,
    }
    if norm == 'rms':
        del tensors['bias']
    return {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}


def library(out_dtype=None, **tensors):
    function = add_layer_norm if 'bias' in tensors else add_rms_norm
    return function(**tensors, eps=EPS, out_dtype=out_dtype)


def definition(x, residual, weight, bias=None, scale=None):
    if scale is not None:
        x = torch.stack([sample * factor.item() for sample, factor in zip(x, scale)]) if len(x) else x
    summed = x if residual is None else x + residual
    normalised = oracles.rms_norm(summed, weight, EPS)
    return (normalised if bias is None else oracles.layer_norm(summed, weight, bias, EPS)), summed


def gradient_like(tensor, seed):
    """The same numbers for all dtypes, as both sides round them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(torch.bfloat16).to(tensor)


def run(tensors, function=library, used=(0, 1)):
    """Outputs and gradients by name, on the CPU, given gradients of the outputs that are `used`."""
    leaves = {k: t if t is None or k == 'scale' else t.detach().requires_grad_() for k, t in tensors.items()}
    outputs = function(**leaves)
    torch.autograd.backward([outputs[i] for i in used], [gradient_like(outputs[i], i) for i in used])
    gradients = {f'grad_{k}': None if t is None else t.grad for k, t in leaves.items()}
    named = dict(zip(('normalised', 'summed'), outputs)) | gradients
    return {k: None if t is None else t.detach().cpu() for k, t in named.items()}


def doubled(tensors):
    return {k: None if t is None else t.cpu().double() for k, t in tensors.items()}


def compare(tensors, tolerance=None, used=(0, 1), **options):
    dtype = tensors['x'].dtype
    actual = run(tensors, lambda **leaves: library(**leaves, **options), used)
    oracles.assert_all_match(actual, run(doubled(tensors), definition, used), tolerance or dtype)
    assert actual['summed'].dtype == torch.promote_types(dtype, torch.float32)
    assert actual['normalised'].dtype == options.get('out_dtype', tensors['weight'].dtype)
    for name, tensor in tensors.items():
        if actual[f'grad_{name}'] is not None:
            assert actual[f'grad_{name}'].dtype == tensor.dtype, name


ADDENDS = [
    pytest.param(True, True, id='add-scaled'),
    pytest.param(True, False, id='add'),
    pytest.param(False, True, id='start-scaled'),
    pytest.param(False, False, id='start'),
]


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm', NORMS)
def test_plain(norm, residual, scale, dtype):
    with use_triton(False):
        compare(arguments(norm, dtype=dtype, residual=residual, scale=scale))


@needs_triton
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm', NORMS)
def test_fused(norm, residual, scale, dtype):
    with use_triton(True):
        compare(arguments(norm, dtype=dtype, residual=residual, scale=scale))


SHAPES = [
    pytest.param((2, 3), id='no-inner-dimension'),
    pytest.param((1, 1, 3), id='one-row'),
    pytest.param((2, 3, 2, 16), id='two-inner-dimensions'),
    pytest.param((4, 9, 64), id='more-rows-than-a-block'),
    pytest.param((1, 3, 1000), id='dim1000'),
    pytest.param((1, 2, 2049), id='dim2049'),
    pytest.param((0, 3, 16), id='no-sample'),
    pytest.param((2, 0, 16), id='no-row'),
]


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('norm', NORMS)
def test_shapes(norm, shape, triton_kernels):
    with use_triton(triton_kernels):
        compare(arguments(norm, shape))


@needs_triton
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('programs', [1, 3])
def test_programs_of_the_backward_pass_that_walk_several_blocks(programs, norm, monkeypatch):
    from vmamba.kernels.fused import add_norm

    monkeypatch.setattr(add_norm, 'PROGRAMS_PER_PROCESSOR', programs)
    monkeypatch.setattr(add_norm, 'processors_of', lambda tensor: 1)
    monkeypatch.setattr(add_norm, 'BLOCK_ELEMENTS', 64)
    with use_triton(True):
        compare(arguments(norm, (3, 7, 13)))


@needs_triton
def test_rows_that_are_too_long_for_the_kernels():
    with use_triton(True), Recorder() as recorder:
        compare(arguments(shape=(1, 8193)))
    assert not recorder.names


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('used', [(0,), (1,)], ids=['normalised', 'summed'])
@pytest.mark.parametrize('residual,scale', ADDENDS)
def test_one_output_alone(residual, scale, used, triton_kernels):
    tensors = arguments('layer', residual=residual, scale=scale)
    with use_triton(triton_kernels):
        actual, expected = run(tensors, used=used), run(doubled(tensors), definition, used)
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None or not actual[name].any(), name
        else:
            oracles.assert_matches(actual[name], expected[name], torch.float32, name)


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('name', ['x', 'residual', 'weight', 'bias'])
def test_one_gradient_alone(name, triton_kernels):
    tensors = arguments('layer')
    with use_triton(triton_kernels):
        expected = run(tensors, used=(0,))[f'grad_{name}']
        alone = run({name: tensors[name]}, lambda **leaf: library(**{**tensors, **leaf}), (0,))[f'grad_{name}']
    assert oracles.relative_error(alone, expected) < 1e-6


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('out_dtype', [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes(out_dtype, norm, triton_kernels):
    """As under autocast, whose output is what the next linear layer takes."""
    tensors = arguments(norm, dtype=torch.float16, weight_dtype=torch.float32)
    with use_triton(triton_kernels):
        compare(tensors, torch.float16, out_dtype=out_dtype)


@pytest.mark.parametrize('triton_kernels', BACKENDS)
def test_the_sum_of_half_precision_is_not_rounded(triton_kernels):
    tensors = arguments(dtype=torch.float16, scale=False)
    with use_triton(triton_kernels):
        _, summed = library(**tensors)
    assert torch.equal(summed, tensors['residual'] + tensors['x'].float())


@pytest.mark.parametrize('triton_kernels', BACKENDS)
def test_a_stream_that_starts_in_fp32_is_no_copy(triton_kernels):
    tensors = arguments(residual=False, scale=False)
    with use_triton(triton_kernels):
        assert library(**tensors)[1].data_ptr() == tensors['x'].data_ptr()


@pytest.mark.parametrize('triton_kernels', BACKENDS)
def test_the_scale_is_a_constant(triton_kernels):
    tensors = {k: t.requires_grad_() for k, t in arguments('layer').items()}
    with use_triton(triton_kernels):
        normalised, summed = library(**tensors)
    (normalised.sum() + summed.sum()).backward()
    assert tensors['scale'].grad is None


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('norm', NORMS)
def test_a_large_mean_and_tiny_numbers(norm, triton_kernels):
    tensors = arguments(norm, scale=False)
    tensors['x'][0] *= 1e-6
    tensors['residual'][0] = 0
    tensors['residual'][1] += 100
    with use_triton(triton_kernels):
        compare(tensors)


@needs_triton
@pytest.mark.parametrize('norm', NORMS)
def test_memory_layout_does_not_matter(norm):
    tensors = arguments(norm)
    with use_triton(True):
        expected = run(tensors)
        views = {k: torch.stack([t, t], dim=-1)[..., 1] for k, t in tensors.items()}
        views['residual'] = tensors['residual'].transpose(0, 1).contiguous().transpose(0, 1)
        assert not any(t.is_contiguous() for t in views.values())
        leaves = {k: t if k == 'scale' else t.detach().requires_grad_() for k, t in views.items()}
        outputs = library(**leaves)
        grads = [gradient_like(out, i).mT.contiguous().mT for i, out in enumerate(outputs)]
        torch.autograd.backward(outputs, grads)
    assert all(out.is_contiguous() for out in outputs)
    actual = [*outputs, *(leaves[k].grad for k in leaves if k != 'scale')]
    names = ['normalised', 'summed', *(f'grad_{k}' for k in leaves if k != 'scale')]
    for name, tensor in zip(names, actual):
        assert torch.equal(tensor.detach().cpu(), expected[name]), name


@needs_triton
def test_two_runs_are_equal_bit_by_bit():
    tensors = arguments('layer', (4, 9, 70), torch.float16)
    with use_triton(True):
        first, second = run(tensors), run(tensors)
    assert all(torch.equal(first[k], second[k]) for k in first if first[k] is not None)


@pytest.mark.parametrize('triton_kernels', BACKENDS)
def test_inputs_are_left_alone(triton_kernels):
    tensors = arguments('layer')
    copies = {k: t.clone() for k, t in tensors.items()}
    with use_triton(triton_kernels):
        run(tensors)
    assert all(torch.equal(t, copies[k]) for k, t in tensors.items())


@needs_triton
def test_what_is_kept_is_a_number_or_two_a_row():
    for norm, moments in (('rms', 1), ('layer', 2)):
        tensors = {k: t if k == 'scale' else t.requires_grad_() for k, t in arguments(norm).items()}
        with use_triton(True), Recorder() as keeping:
            library(**tensors)
        with use_triton(True), torch.no_grad(), Recorder() as forgetting:
            library(**tensors)
        assert keeping.names == forgetting.names == ['add_norm_fused']
        assert keeping.outputs[0][2].shape == (moments, 15)
        assert not forgetting.outputs[0][2].numel()


class AddNorm(torch.nn.Module):
    def forward(self, tensors):
        return library(**tensors)


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('out_dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_layer_norm_alone(dtype, out_dtype, triton_kernels):
    tensors = arguments('layer', dtype=dtype, weight_dtype=torch.float32, residual=False, scale=False)
    tensors = {name: tensors[name] for name in ('x', 'weight', 'bias')}
    with use_triton(triton_kernels):
        actual = run(tensors, lambda **leaves: [layer_norm(**leaves, eps=EPS, out_dtype=out_dtype)], (0,))
    expected = run(doubled(tensors), lambda **leaves: definition(residual=None, **leaves)[:1], (0,))
    assert (actual['normalised'].dtype, actual['grad_x'].dtype) == (out_dtype, dtype)
    oracles.assert_all_match(actual, expected, torch.float16 if torch.float16 in (dtype, out_dtype) else dtype)


@needs_triton
def test_layer_norm_alone_writes_and_keeps_no_copy_of_its_input():
    x, weight, bias = (
        arguments('layer', dtype=torch.float16)[name].requires_grad_() for name in ('x', 'weight', 'bias')
    )
    with use_triton(True), Recorder() as recorder:
        y = layer_norm(x, weight, bias)
    assert recorder.names == ['add_norm_fused'] and not recorder.outputs[0][1].numel()
    assert any(kept is not None and kept.data_ptr() == x.data_ptr() for kept in y.grad_fn.saved_tensors)


@needs_triton
@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm', NORMS)
def test_compiled_for_any_batch_size(norm, residual, scale, fused, monkeypatch):
    monkeypatch.setattr(add_norm, '_FUSE_WHEN_COMPILED', fused)
    torch.compiler.reset()
    compiled = torch.compile(library, fullgraph=True, dynamic=True, backend='aot_eager')
    with use_triton(True):
        for batch in (2, 3, 5):
            tensors = arguments(norm, (batch, 3, 13), residual=residual, scale=scale)
            actual = run(tensors, lambda **leaves: compiled(**leaves))
            oracles.assert_all_match(actual, run(doubled(tensors), definition), torch.float32)


@needs_triton
@pytest.mark.parametrize('norm', NORMS)
def test_exported_graphs_hold_the_kernels_if_told_so(norm, monkeypatch):
    monkeypatch.setattr(add_norm, '_FUSE_WHEN_COMPILED', True)
    tensors = arguments(norm)
    with use_triton(True):
        exported = torch.export.export(AddNorm(), (tensors,))
        assert str(exported.graph).count('vmamba.add_norm_fused.default') == 1
        for ours, theirs in zip(exported.module()(tensors), library(**tensors)):
            assert torch.equal(ours, theirs)


@needs_triton
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::FutureWarning')
def test_captured_graphs_hold_plain_operations(monkeypatch):
    monkeypatch.setattr(add_norm, '_FUSE_WHEN_COMPILED', False)
    tensors = arguments('layer')
    with use_triton(True):
        expected = library(**tensors)
        exported = torch.export.export(AddNorm(), (tensors,))
        traced = torch.jit.trace(lambda x: library(**{**tensors, 'x': x}), tensors['x'])
    for graph in str(exported.graph), str(traced.graph):
        assert 'layer_norm' in graph and 'add_norm_fused' not in graph
    for captured in exported.module()(tensors), traced(tensors['x']):
        for ours, theirs in zip(captured, expected):
            assert oracles.relative_error(ours, theirs) < 1e-6


def operator_arguments(keep, x, residual, weight, bias=None, scale=None):
    return x, residual, scale, weight, bias, EPS, torch.float16, keep


@needs_triton
@pytest.mark.parametrize('keep', [False, True], ids=['forgetting', 'keeping'])
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm,dtype', [('rms', torch.float32), ('layer', torch.float16)], ids=str)
def test_registration(norm, dtype, residual, scale, keep):
    tensors = arguments(norm, dtype=dtype, residual=residual, scale=scale)
    tensors = {k: t if t is None or k == 'scale' else t.requires_grad_(keep) for k, t in tensors.items()}
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operator = torch.ops.vmamba.add_norm_fused.default
    torch.library.opcheck(operator, operator_arguments(keep, **tensors), test_utils=checks)


@needs_triton
@pytest.mark.parametrize('with_grad_out', [True, False])
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm,dtype', [('rms', torch.float32), ('layer', torch.float16)], ids=str)
def test_registration_of_the_backward_pass(norm, dtype, residual, scale, with_grad_out):
    tensors = arguments(norm, dtype=dtype, residual=residual, scale=scale)
    out, _, moments = torch.ops.vmamba.add_norm_fused(*operator_arguments(True, **tensors))
    summed = torch.randn(out.shape, device=DEVICE)
    grads = (torch.randn_like(out) if with_grad_out else None), torch.randn_like(summed)
    args = *grads, summed, tensors['scale'], tensors['weight'], moments, dtype, residual
    checks = ('test_schema', 'test_faketensor')
    torch.library.opcheck(torch.ops.vmamba.add_norm_fused_backward.default, args, test_utils=checks)


@needs_triton
def test_gradients_of_what_kept_nothing_are_an_error():
    tensors = {k: t.requires_grad_() for k, t in arguments().items()}
    out, *_ = torch.ops.vmamba.add_norm_fused(*operator_arguments(False, **tensors))
    with pytest.raises(RuntimeError, match='keep=True'):
        out.sum().backward()


BAD = [
    ('x', torch.ones(13), '(13,)'),
    ('x', torch.ones(3, 5, 13, dtype=torch.int64), 'int64'),
    ('x', torch.ones(3, 5, 0), '(3, 5, 0)'),
    ('residual', torch.ones(3, 4, 13), '(3, 4, 13)'),
    ('residual', torch.ones(3, 5, 13, dtype=torch.float16), 'float16'),
    ('weight', torch.ones(12), '(12,)'),
    ('bias', torch.ones(1, 13), '(1, 13)'),
    ('scale', torch.ones(3, 1, 1), '(3, 1, 1)'),
    ('scale', torch.ones(2), '(2,)'),
]


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('name,tensor,value', BAD, ids=[f'{case[0]}{case[2]}' for case in BAD])
def test_a_bad_argument_is_an_error_that_shows_it(name, tensor, value, triton_kernels):
    tensors = {**arguments('layer'), name: tensor.to(DEVICE)}
    with use_triton(triton_kernels), pytest.raises(ValueError, match=f'^{name} must be ') as caught:
        library(**tensors)
    assert value in str(caught.value)


def test_an_integer_output_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match='^out_dtype .* torch.int32'):
        library(torch.int32, **arguments())


def on_gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    return pytest.mark.gpu(skip(test))


LARGE = [(64, 197, 192), (8, 730, 384), (5, 197, 768), (3, 333, 1000), (2, 65, 5000), (2, 33, 8192)]


@on_gpu
@pytest.mark.parametrize('dtype', oracles.DTYPES[1:], ids=str)
@pytest.mark.parametrize('residual,scale', ADDENDS)
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('shape', LARGE, ids=str)
def test_large_tensors(shape, norm, residual, scale, dtype):
    compare(arguments(norm, shape, dtype, residual, scale), out_dtype=dtype)


@on_gpu
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('shape', LARGE[:4], ids=str)
def test_repeated_runs_are_equal_bit_by_bit(shape, norm):
    tensors = arguments(norm, shape, torch.bfloat16)
    first = run(tensors)
    for _ in range(5):
        again = run(tensors)
        assert all(torch.equal(first[k], again[k]) for k in first if first[k] is not None)


@on_gpu
def test_more_numbers_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip('needs 40 GiB of GPU memory')
    tensors = dict(residual=None, weight=torch.ones(768, device=DEVICE))
    x = torch.randn(2, 1_500_000, 768, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    normalised, summed = library(torch.bfloat16, x=x, **tensors)
    normalised.backward(normalised.detach())
    for rows in (slice(0, 5), slice(-5, None)):
        few = x[1:, rows].detach().requires_grad_()
        expected, total = library(torch.bfloat16, x=few, **tensors)
        expected.backward(expected.detach())
        assert torch.equal(summed[1:, rows], total)
        assert torch.equal(normalised[1:, rows], expected)
        assert torch.equal(x.grad[1:, rows], few.grad)
