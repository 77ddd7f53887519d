"""The registration of operators, on a small one."""

from typing import Optional, Tuple

import pytest
import torch
from recorder import Recorder
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels._operator import OPERATORS, Operator


def _forward(x: Tensor, y: Optional[Tensor], power: int, save: bool) -> Tuple[Tensor, Tensor]:
    """x ** power + y, and x for the backward pass."""
    out = x**power if y is None else x**power + y
    return out, x.clone() if save else x.new_empty(0)


def _backward(grads, inputs, saved):
    (grad,), (_, y, power), (x,) = grads, inputs, saved
    grad_x = (grad * power * x ** (power - 1)).double()
    return grad_x, None if y is None else grad


def _like(x, y, power, save):
    return torch.empty_like(x), torch.empty_like(x) if save else x.new_empty(0)


def _macs(x, y, power):
    return x[0] * power


toy = Operator('toy_power', _forward, _backward, _like, macs=_macs)
del OPERATORS['toy_power']  # not one of the library
op = torch.ops.vmamba.toy_power


@pytest.fixture
def x():
    return torch.randn(5, requires_grad=True)


@pytest.fixture
def y():
    return torch.randn(5, requires_grad=True)


def test_results_and_gradients(x, y):
    out = toy(x, y, 3)
    grads = torch.autograd.grad(out.sum(), (x, y))
    torch.testing.assert_close(out, x**3 + y)
    torch.testing.assert_close(grads, (3 * x**2, torch.ones(5)))


def test_absent_tensors_have_no_gradient(x):
    (grad,) = torch.autograd.grad(toy(x, None, 2).sum(), x)
    torch.testing.assert_close(grad, 2 * x)


def test_calls_go_through_the_dispatcher_only_where_something_watches(x, y):
    direct = torch.autograd.grad(toy(x, y, 3).sum(), (x, y))
    with Recorder() as calls:
        watched = torch.autograd.grad(toy(x, y, 3).sum(), (x, y))
    assert calls.names == ['toy_power', 'toy_power_backward']
    torch.testing.assert_close(watched, direct)


def test_nothing_is_saved_that_nobody_needs(x):
    for call in (torch.no_grad, torch.inference_mode):
        with call(), Recorder() as calls:
            toy(x, None, 2)
        assert calls.outputs[0][1].numel() == 0
    with Recorder() as calls:
        toy(x.detach(), None, 2)
    assert calls.outputs[0][1].numel() == 0


def test_gradients_without_what_was_saved_are_an_error(x):
    out, _ = op(x, None, 2, False)
    with pytest.raises(RuntimeError, match='toy_power was called with save=False and has no gradients'):
        out.sum().backward()


def test_gradients_have_the_dtypes_of_the_inputs():
    x = torch.randn(5, dtype=torch.float16, requires_grad=True)
    with Recorder() as calls:
        toy(x, None, 2).sum().backward()
    assert x.grad.dtype == torch.float16 and calls.outputs[1][0].dtype == torch.float16


def test_gradients_lie_in_memory_of_their_own(x, y):
    """As PyTorch requires of operators: here that of y is the one that comes in."""
    with Recorder() as calls:
        toy(x, y, 1).backward(torch.ones(5))
    grad_in, grad_y = calls.arguments[1][0], calls.outputs[1][1]
    assert torch.equal(grad_in, grad_y)
    checks = 'test_schema', 'test_faketensor'
    torch.library.opcheck(calls.operators[1], calls.arguments[1], test_utils=checks)


def test_a_checkpointed_call_unpacks_what_is_saved_once(x):
    """Each time would recompute it."""
    computed = []

    def function(x):
        computed.append(1)
        return toy(x, None, 3)

    checkpoint(function, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, 3 * x**2)
    assert len(computed) == 2


def test_flops_of_both_passes(x):
    with FlopCounterMode(display=False) as counter:
        out = toy(x, None, 3)
    assert counter.get_total_flops() == 2 * 15
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * 15


def test_pytorchs_own_checks(x, y):
    for arguments in ((x, y, 3, True), (x, None, 2, True), (x.detach(), None, 2, False)):
        torch.library.opcheck(op, arguments)


def test_exported_programs_have_the_operator():
    class Module(torch.nn.Module):
        def forward(self, x):
            return toy(x, None, 2)

    program = torch.export.export(Module(), (torch.randn(5),))
    assert any(node.target is op.default for node in program.graph.nodes)
