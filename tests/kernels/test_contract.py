"""What holds for every operator, in plain PyTorch and on Triton."""

import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import CASES, assert_equal, compare, in_double, run
from recorder import Recorder
from torch.autograd import forward_ad

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')

PLAIN_ONLY = ('bidirectional_scan',)
OF_PYTORCH = (
    'depthwise_conv2d',
    'add_norm',
    'rms_norm',
    'layer_norm',
    'gated_rms_norm',
)  # by its own operators where not on Triton
# Widths of convolutions, which no other tensor shares.
FREE_SIZES = ('bimamba_core', 'conv_weight', 2), ('bidirectional_conv1d', 'weight', 2), ('causal_conv1d', 'weight', 1)
# Their parts are compared one by one: here what passes between them is rounded too.
IN_TWO_PARTS = ('ss2d_core', 'bimamba_core')


@pytest.fixture(params=CASES)
def case(request, backend):
    if backend and request.param in PLAIN_ONLY:
        pytest.skip('has no kernels')
    return CASES[request.param]


@pytest.fixture
def name(case):
    return next(name for name, other in CASES.items() if other is case)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_results_and_gradients(case, name, backend, dtype):
    """Against the definition; raw bfloat16 is not interpreted as a GPU computes it."""
    if backend and (dtype == torch.float64 or DEVICE == 'cpu' and dtype == torch.bfloat16):
        pytest.skip('not on Triton')
    tensors = case.arguments(dtype=dtype)
    if name not in IN_TWO_PARTS or dtype.itemsize > 2:
        compare(case, tensors, dtype)
        return
    expected = run(case.definition, in_double(tensors), **case.options)
    actual = run(case.function, tensors, **case.options)
    bound, *_ = oracles.TOLERANCES[dtype]
    errors = {k: oracles.relative_error(actual[k], expected[k]) for k in expected}
    assert max(errors.values()) < 2**0.5 * bound, errors


def test_gradients_have_the_dtypes_of_their_tensors(case):
    """As under autocast, with maps in half precision and parameters in fp32."""
    tensors = case.arguments(dtype=torch.float16)
    actual = run(case.function, tensors, **case.options)
    assert actual['result_0'].dtype == (
        torch.float32 if case.arguments.__name__ in ('rms_norm', 'layer_norm', 'add_norm') else torch.float16
    )
    assert all(t is None or actual[f'grad_{k}'].dtype == t.dtype for k, t in tensors.items())


@pytest.mark.parametrize('seqlen', [0, 1], ids=['no-batch', 'batch-of-one'])
def test_small_batches(case, seqlen):
    sizes = dict(shape=(seqlen, 5, 13)) if 'norm' in case.arguments.__name__ else dict(batch=seqlen)
    compare(case, case.arguments(**sizes), torch.float32)


def transposed(t):
    """The last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.ndim > 1 else sliced(t)


def sliced(t):
    """Every second number of a row."""
    return t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), float('nan'))[..., 3::2].copy_(t)


def moved(t):
    """The first two dimensions swapped in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else sliced(t)


@pytest.mark.parametrize('layout', [transposed, sliced, moved], ids=lambda f: f.__name__)
def test_memory_layouts(case, layout):
    tensors = case.arguments()
    laid_out = {k: None if t is None else layout(t) for k, t in tensors.items()}
    expected = run(case.function, tensors, **case.options)
    oracles.assert_all_match(run(case.function, laid_out, **case.options), expected, torch.float32)


def test_gradients_without_strides(case):
    """As `sum()` gives them."""
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    leaves = {k: t.detach().double().cpu().requires_grad_() for k, t in tensors.items()}
    ours = {k: t.requires_grad_() for k, t in tensors.items()}
    for function, arguments in ((case.definition, leaves), (case.function, ours)):
        results = function(**arguments, **case.options)
        sum(y.sum() for y in (results if isinstance(results, tuple) else (results,))).backward()
    for k, leaf in leaves.items():
        oracles.assert_matches(ours[k].grad.cpu(), leaf.grad, torch.float32, k)


def test_two_runs_are_equal_bit_by_bit(case):
    tensors = case.arguments()
    assert_equal(run(case.function, tensors, **case.options), run(case.function, tensors, **case.options))


def test_the_graph_can_be_walked_twice(case):
    leaves = {k: None if t is None else t.requires_grad_() for k, t in case.arguments().items()}
    results = case.function(**leaves, **case.options)
    y = results[0] if isinstance(results, tuple) else results
    wanted = [t for k, t in leaves.items() if t is not None]
    first, second = (torch.autograd.grad(y.square().sum(), wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_inputs_are_left_alone(case):
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    copies = {k: t.clone() for k, t in tensors.items()}
    run(case.function, tensors, **case.options)
    assert_equal(tensors, copies)


def test_one_gradient_alone(case, backend):
    """Of each tensor; of three on Triton, whose kernels compute all."""
    tensors = case.arguments()
    expected = run(case.function, tensors, **case.options)
    names = [k for k, t in tensors.items() if t is not None]
    for name in names[:: max(len(names) // 3, 1)] if backend else names:
        actual = run(case.function, tensors, [name], **case.options)
        torch.testing.assert_close(actual[f'grad_{name}'], expected[f'grad_{name}'])


def test_inference_gives_the_same(case):
    tensors = case.arguments()
    expected = run(case.function, tensors, **case.options)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            results = case.function(**tensors, **case.options)
        results = results if isinstance(results, tuple) else (results,)
        for i, y in enumerate(results):
            torch.testing.assert_close(y.cpu(), expected[f'result_{i}'])


def test_watched_calls_give_the_same(case):
    """Through PyTorch's dispatcher, forward and backward."""
    tensors = case.arguments()
    expected = run(case.function, tensors, **case.options)
    with Recorder() as calls:
        actual = run(case.function, tensors, **case.options)
    assert_equal(actual, expected)
    assert not calls.names or calls.names[-1] == f'{calls.names[0]}_backward'


def test_registration(case, backend):
    """Schemas, fakes and autograd of the operators that run, by PyTorch's own checks."""
    with Recorder() as calls:
        run(case.function, case.arguments(), **case.options)
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    for operator, arguments in zip(calls.operators, calls.arguments):
        torch.library.opcheck(operator, arguments, test_utils=checks, **oracles.OPCHECK_TOLERANCE)


@pytest.mark.slow
def test_captured_for_symbolic_sizes(case):
    """Without graph breaks. Tests of models capture them for known sizes."""
    torch.compiler.reset()
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    captured = torch.compile(case.function, dynamic=True, fullgraph=True, backend='aot_eager')
    expected = run(case.function, tensors, **case.options)
    actual = run(captured, tensors, **case.options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda message: f'{name}: {message}')  # noqa: B023


def one_of(case):
    """A function of the first tensor with one result, and that tensor."""
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    first = next(iter(tensors))

    def function(tensor):
        results = case.function(**{**tensors, first: tensor}, **case.options)
        return results[0] if isinstance(results, tuple) else results

    return function, tensors[first]


def test_gradients_of_gradients_are_an_error(case, name, backend):
    function, x = one_of(case)
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    if backend or name not in OF_PYTORCH:
        with pytest.raises(RuntimeError, match='once_differentiable'):
            grad.sum().backward()


def test_functional_transforms_are_an_error(case, name, backend):
    """Of PyTorch, for all operators with a backward pass of their own."""
    function, x = one_of(case)
    if backend or name not in OF_PYTORCH:
        with pytest.raises(RuntimeError, match='functorch transforms'):
            torch.func.grad(lambda x: function(x).sum())(x)


def dual(function, tensor):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))).tangent


MODES = {
    'jvp': lambda function, tensor: torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),)),
    'jacfwd': lambda function, tensor: torch.func.jacfwd(function)(tensor),
    'dual': dual,
}


@pytest.mark.parametrize('mode', MODES)
def test_a_tangent_is_an_error_that_names_the_function(case, name, mode):
    """Of the first tensor and of the last one."""
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    for of in (next(iter(tensors)), list(tensors)[-1]):
        with pytest.raises(NotImplementedError, match=rf'{name} is differentiable in reverse mode only, got {of} '):
            MODES[mode](lambda t: case.function(**{**tensors, of: t}, **case.options), tensors[of])  # noqa: B023


def test_constants_beside_tangents_give_the_same(case):
    function, x = one_of(case)
    expected = function(x)
    with forward_ad.dual_level():
        assert torch.equal(function(x), expected)
    constant, tangent = torch.func.jvp(lambda t: function(x) + t, (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(constant, expected + 1) and torch.equal(tangent, torch.ones_like(expected))


def test_a_bad_argument_is_an_error_that_shows_it(case, name):
    """Of each tensor: a dimension too many, another size of each dimension, integers, another device."""
    tensors = {k: t for k, t in case.arguments().items() if t is not None}
    first = next(iter(tensors))
    for of, tensor in tensors.items():
        bad = [tensor.to(torch.int32)]
        if of != first:
            fixed = [i for i in range(tensor.ndim) if (name, of, i) not in FREE_SIZES]
            bad += [torch.cat([tensor, tensor], dim=i) for i in fixed]
            bad += [tensor.unsqueeze(0).expand(2, 2, *tensor.shape)]
        for other in bad:
            with pytest.raises(ValueError, match=name) as error:
                case.function(**{**tensors, of: other}, **case.options)
            message = str(error.value)
            assert any(k in message for k in tensors) and len(message.splitlines()) == 1, (of, other.shape, message)
        if of != first:
            with pytest.raises(ValueError, match=rf'^{name} .* got {first} on {DEVICE}.* and {of} on meta$'):
                case.function(**{**tensors, of: tensor.to('meta')}, **case.options)


def test_doubles_on_triton_are_an_error_that_says_so(case, backend):
    if backend:
        with pytest.raises(RuntimeError, match='torch.float64'):
            case.function(**case.arguments(dtype=torch.float64), **case.options)


def test_without_data_only_shapes_are_computed(case, backend):
    if not backend:
        tensors = case.arguments()
        results = case.function(**tensors, **case.options)
        on_meta = case.function(**{k: None if t is None else t.to('meta') for k, t in tensors.items()}, **case.options)
        pairs = zip(results, on_meta) if isinstance(results, tuple) else [(results, on_meta)]
        assert all(a.shape == b.shape and a.dtype == b.dtype and b.is_meta for a, b in pairs)
