"""The Triton kernels called directly, and through PyTorch's dispatcher where something watches."""

import pytest
import test_add_norm
import test_bimamba_core
import test_conv
import test_conv2d
import test_ss2d
import torch
from recorder import Recorder
from test_selective_scan import arguments as scan_arguments
from vmamba.kernels import (
    add_layer_norm,
    bidirectional_conv1d,
    bimamba_core,
    causal_conv1d,
    depthwise_conv2d,
    selective_scan,
    ss2d_scan,
    use_triton,
)

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
CALLS = {
    'ss2d_scan': (ss2d_scan, test_ss2d.arguments((2, 3), 1, 4, 1, 1, torch.float32)),
    'selective_scan': (selective_scan, scan_arguments(batch=1, dim=4, seqlen=5, dstate=1, dtype=torch.float32)),
    'bimamba_core': (bimamba_core, test_bimamba_core.arguments(1, 5, 4, 1, 1)),
    'bidirectional_conv1d': (bidirectional_conv1d, test_conv.arguments(1, 5, 4, dtype=torch.float32)),
    'causal_conv1d': (causal_conv1d, test_conv.causal_arguments(1, 5, 4, dtype=torch.float32)),
    'depthwise_conv2d': (depthwise_conv2d, test_conv2d.arguments(1, 3, 2, 4)),
    'add_layer_norm': (lambda x, **tensors: add_layer_norm(x, **tensors)[0], test_add_norm.arguments('layer')),
}


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_triton(True):
        yield


@pytest.fixture(params=CALLS)
def call(request):
    """A function of the map or sequence, and that."""
    function, tensors = CALLS[request.param]
    name, *_ = tensors
    constants = {k: None if t is None else t.to(DEVICE) for k, t in tensors.items() if k != name}
    return lambda x: function(x, **constants), tensors[name].to(DEVICE)


def test_watched_calls_give_the_same(call):
    function, x = call
    ones = torch.ones_like(function(x))
    expected = torch.autograd.functional.vjp(function, x, ones)
    with Recorder() as calls:
        actual = torch.autograd.functional.vjp(function, x, ones)
    assert len(calls.names) == 2 and calls.names[1] == f'{calls.names[0]}_backward'
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def test_transforms_are_an_error(call):
    """Of PyTorch, for all operators with a backward pass of their own."""
    function, x = call
    with pytest.raises(RuntimeError, match='functorch transforms'):
        torch.func.grad(lambda x: function(x).sum())(x)


def test_gradients_of_gradients_are_an_error(call):
    function, x = call
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_the_graph_can_be_walked_twice(call):
    function, x = call
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    first, second = (torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_captured_for_symbolic_sizes(call):
    function, x = call
    captured = torch.compile(function, dynamic=True, fullgraph=True, backend='aot_eager')
    ones = torch.ones_like(function(x))
    for ours, theirs in zip(*(torch.autograd.functional.vjp(f, x, ones) for f in (captured, function))):
        torch.testing.assert_close(ours, theirs)
