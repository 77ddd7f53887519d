"""What every public function refuses, on both paths: tensors of several devices, and tangents of forward mode."""

import pytest
import test_add_norm
import test_bidirectional
import test_bimamba_core
import test_conv
import test_conv2d
import test_selective_scan
import test_ss2d
import torch
from torch.autograd import forward_ad
from vmamba.kernels import use_triton
from vmamba.kernels.backend import triton

from vmamba import kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FP32 = dict(dtype=torch.float32)


def core_arguments():
    tensors = test_ss2d.arguments((2, 3), 1, 4, 1, 1, **FP32)
    rows = 4 * tensors.pop('x_dbl').shape[-1]
    x = tensors.pop('x')
    norm = dict(norm_weight=torch.ones(4), norm_bias=torch.zeros(4))
    return {'x': x, 'x_proj_weight': torch.randn(rows, 4), **tensors, **norm}


CALLS = {
    'selective_scan': test_selective_scan.arguments(batch=1, dim=4, seqlen=5, dstate=1, **FP32),
    'ss2d_scan': test_ss2d.arguments((2, 3), 1, 4, 1, 1, **FP32),
    'ss2d_core': core_arguments(),
    'bidirectional_scan': test_bidirectional.arguments(1, 5, 4, 1, 1, **FP32),
    'bimamba_core': test_bimamba_core.arguments(1, 5, 4, 1, 1),
    'bidirectional_conv1d': test_conv.arguments(1, 5, 4, **FP32),
    'causal_conv1d': test_conv.causal_arguments(1, 5, 4, initial=True, **FP32),
    'depthwise_conv2d': test_conv2d.arguments(1, 3, 2, 4),
    'add_rms_norm': test_add_norm.arguments('rms'),
    'add_layer_norm': test_add_norm.arguments('layer'),
    'layer_norm': {k: t for k, t in test_add_norm.arguments('layer').items() if k not in ('residual', 'scale')},
}
BACKENDS = [
    pytest.param(False, id='plain'),
    pytest.param(True, id='triton', marks=pytest.mark.skipif(triton is None, reason='needs the package triton')),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_triton(request.param):
        yield


@pytest.fixture(params=CALLS)
def call(request):
    """The name of a function, the function of its tensors with one result, and these."""

    def function(**tensors):
        result = getattr(kernels, request.param)(**tensors)
        return result[0] if isinstance(result, tuple) else result

    tensors = {k: t.to(DEVICE) for k, t in CALLS[request.param].items() if t is not None}
    return request.param, function, tensors


def dual(function, tensor):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))).tangent


MODES = {
    'jvp': lambda function, tensor: torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),)),
    'jacfwd': lambda function, tensor: torch.func.jacfwd(function)(tensor),
    'dual': dual,
}


@pytest.mark.parametrize('mode', MODES)
def test_a_tangent_is_an_error_that_names_the_function(call, backend, mode):
    """Of the first tensor and of the last one."""
    name, function, tensors = call
    for of in (next(iter(tensors)), list(tensors)[-1]):
        with pytest.raises(NotImplementedError, match=rf'{name} is differentiable in reverse mode only, got {of} '):
            MODES[mode](lambda tensor: function(**{**tensors, of: tensor}), tensors[of])  # noqa: B023


def test_constants_beside_tangents_give_the_same(call, backend):
    _, function, tensors = call
    expected = function(**tensors)
    with forward_ad.dual_level():
        assert torch.equal(function(**tensors), expected)
    constant, tangent = torch.func.jvp(lambda x: function(**tensors) + x, (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(constant, expected + 1) and torch.equal(tangent, torch.ones_like(expected))


def test_reverse_mode_beside_tangents(call, backend):
    _, function, tensors = call
    name, tensor = next(iter(tensors.items()))
    others = {k: t for k, t in tensors.items() if k != name}
    leaf = tensor.clone().requires_grad_()
    with forward_ad.dual_level():
        y = function(**{name: leaf}, **others)
        y.backward(torch.randn_like(y))
    assert leaf.grad.abs().sum() > 0


def test_the_checks_do_not_break_graphs(call, backend):
    _, function, tensors = call
    torch.compiler.reset()  # all calls are one function to it
    captured = torch.compile(function, fullgraph=True, backend='aot_eager')
    expected = function(**tensors)
    torch.testing.assert_close(captured(**tensors), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(captured(**tensors), expected)


def test_tensors_on_two_devices_are_an_error_that_names_them(call, backend):
    name, function, tensors = call
    first, *others = tensors
    for other in others:
        with pytest.raises(ValueError, match=rf'^{name} .* got {first} on {DEVICE}.* and {other} on meta$'):
            function(**{**tensors, other: tensors[other].to('meta')})


def test_what_is_no_real_number_is_on_the_same_device_too():
    tensors = test_conv.causal_arguments(1, 5, 4)
    seq_idx = torch.zeros(1, 5, dtype=torch.int32, device='meta')
    with pytest.raises(ValueError, match='seq_idx on meta'):
        kernels.causal_conv1d(**tensors, seq_idx=seq_idx)
    states = torch.zeros(1, 4, 3, dtype=torch.float64, device='meta')
    with pytest.raises(ValueError, match='final_states_out on meta'):
        kernels.causal_conv1d(**tensors, return_final_states=True, final_states_out=states)
