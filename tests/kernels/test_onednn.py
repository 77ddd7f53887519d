"""Linear layers on a CPU, by oneDNN where the processor has AVX-512 and by PyTorch elsewhere, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import linear, onednn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products of any size are oneDNN's, on any processor; their number."""
    monkeypatch.setattr(onednn, '_MIN_MACS', 0)
    monkeypatch.setattr(onednn, '_has_onednn', lambda: True)
    multiply, calls = onednn._multiply, []
    monkeypatch.setattr(onednn, '_multiply', lambda *args: calls.append(args) or multiply(*args))
    return calls


def arguments(*sizes, inner=33, out=20, bias=True):
    return [
        torch.randn(*sizes, inner).requires_grad_(),
        (torch.randn(out, inner) / inner**0.5).requires_grad_(),
        torch.randn(out).requires_grad_() if bias else None,
    ]


def results(function, tensors, create_graph=False):
    """The result, its gradients by an uneven loss, and on request second derivatives of all."""
    given = [t for t in tensors if t is not None]
    out = function(*tensors)
    grads = torch.autograd.grad(
        (out.sin() * torch.linspace(1, 2, out.shape[-1])).sum(), given, create_graph=create_graph
    )
    if not create_graph:
        return [out, *grads]
    seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), given)
    return [out, *grads, *seconds]


def in_double(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=2e-5 * other.abs().max().item())


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('inner,out', [(33, 20), (20, 33), (1, 5), (5, 1), (96, 384)])
@pytest.mark.parametrize('sizes', [(7,), (1,), (2, 9), (2, 3, 1, 5)])
def test_results_and_gradients(sizes, inner, out, bias, products):
    tensors = arguments(*sizes, inner=inner, out=out, bias=bias)
    actual = results(linear, tensors)
    assert len(products) == 3 and actual[0].is_contiguous()
    assert_close(actual, results(F.linear, in_double(tensors)))


def test_second_derivatives(products):
    tensors = arguments(2, 9)
    assert_close(results(linear, tensors, create_graph=True), results(F.linear, in_double(tensors), create_graph=True))
    assert len(products) > 3


@pytest.mark.parametrize(
    'change', [lambda t: t[:, ::2], lambda t: t.mT, lambda t: t[:1].expand(8, -1), lambda t: t[2:]]
)
def test_any_strides(change):
    x, other = change(torch.randn(8, 8)), torch.randn(8, 8)
    weight = change(other)
    expected = F.linear(x.double(), weight.double())
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_any_strides():
    tensors = arguments(4, 9)
    permuted = torch.randn(20, 9, 4).permute(2, 1, 0)
    for grad in (permuted, permuted[:1, :1].expand(4, 9, -1)):
        actual = torch.autograd.grad(linear(*tensors), tensors, grad)
        assert_close(actual, torch.autograd.grad(F.linear(*tensors), tensors, grad))


@pytest.mark.parametrize('frozen', [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_tensors_get_no_gradient_and_cost_no_product(frozen, products):
    tensors = arguments(7)
    for i in frozen:
        tensors[i].requires_grad_(False)
    linear(*tensors).sum().backward()
    assert [t.grad is None for t in tensors] == [i in frozen for i in range(3)]
    assert len(products) == 3 - len({0, 1} & set(frozen))


def test_large_products_only(products, monkeypatch):
    monkeypatch.setattr(onednn, '_MIN_MACS', 7 * 33 * 20)
    linear(*arguments(7))
    assert len(products) == 1
    linear(*arguments(6))
    assert len(products) == 1


def jvp(x):
    return torch.func.jvp(lambda x: linear(x, torch.ones(3, 5)), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize(
    'call',
    [
        lambda x: linear(x.double(), torch.ones(3, 5, dtype=torch.double)),
        lambda x: linear(x.bfloat16(), torch.ones(3, 5, dtype=torch.bfloat16)),
        lambda x: linear(x.to('meta'), torch.ones(3, 5, device='meta')),
        lambda x: linear(x[0], torch.ones(3, 5)),
        lambda x: torch.vmap(lambda x: linear(x, torch.ones(3, 5)))(x.unsqueeze(1)),
        lambda x: torch.func.grad(lambda x: linear(x, torch.ones(3, 5)).sum())(x),
        jvp,
        lambda x: torch.jit.trace(lambda x: linear(x, torch.ones(3, 5)), x, check_trace=False)(x),
        lambda x: torch.compile(lambda x: linear(x, torch.ones(3, 5)), backend='eager', fullgraph=True)(x),
        lambda x: torch.autocast('cpu', torch.bfloat16)(linear)(x, torch.ones(3, 5)),
    ],
)
def test_what_is_left_to_torch(call, products):
    call(torch.randn(4, 5))
    assert not products


def test_results_can_be_changed_in_place(products):
    x, weight, bias = arguments(2, 9)
    linear(x, weight, bias).permute(0, 2, 1).relu_().sum().backward()
    assert products
    expected = torch.autograd.grad(F.linear(x, weight, bias).relu().sum(), x)
    assert_close([x.grad], [expected[0].double()])


def test_operations_are_counted(products):
    with FlopCounterMode(display=False) as counter:
        linear(*arguments(7))
    assert counter.get_total_flops() == 2 * 7 * 33 * 20 and not products


def test_a_wrong_shape_is_an_error():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        linear(torch.randn(4, 5), torch.randn(3, 6))
