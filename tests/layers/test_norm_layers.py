"""The norms against their definitions, and the dtypes that they return."""

import oracles
import pytest
import torch
from cases import BACKENDS, DEVICE
from torch import nn

from vmamba.kernels import use_triton
from vmamba.layers import LayerNorm, LayerNorm2d, RmsNorm

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NORMS = [RmsNorm, LayerNorm, LayerNorm2d]


def norm_and_input(kind, dtype, **options):
    norm = kind(12, dtype=dtype, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    shape = (2, 12, 3, 5) if kind is LayerNorm2d else (3, 5, 12)
    return norm, 1 + torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)) * 1e-2


def definition(norm, x):
    parameters = [parameter.double() for parameter in norm.parameters()]
    if isinstance(norm, LayerNorm2d):
        return oracles.layer_norm(x.double().movedim(1, -1), *parameters, norm.eps).movedim(-1, 1)
    return (oracles.rms_norm if isinstance(norm, RmsNorm) else oracles.layer_norm)(x.double(), *parameters, norm.eps)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', NORMS)
def test_a_norm_computes_in_the_dtype_of_its_input_and_returns_that_of_its_weights(kind, dtype):
    norm, x = norm_and_input(kind, dtype)
    y = norm(x)
    assert y.dtype == dtype
    oracles.assert_matches(y, definition(norm, x), dtype)


@pytest.mark.parametrize('triton_kernels', BACKENDS)
@pytest.mark.parametrize('kind', NORMS)
def test_the_epsilon_and_the_gradients_are_those_of_the_definition(kind, triton_kernels):
    norm, x = norm_and_input(kind, torch.float32, eps=1e-3)
    norm, x = norm.to(DEVICE), x.to(DEVICE).requires_grad_()
    wide = {name: p.detach().double() for name, p in norm.named_parameters()}
    exact = kind(12, eps=1e-3, dtype=torch.float64).to(DEVICE)
    exact.load_state_dict(wide)
    wide_x = x.detach().double().requires_grad_()
    with use_triton(triton_kernels):
        y = norm(x)
    expected = definition(exact, wide_x)
    weights = torch.randn_like(y)
    actual = torch.autograd.grad((y * weights).sum(), [x, *norm.parameters()])
    exact_grads = torch.autograd.grad((expected * weights).sum(), [wide_x, *exact.parameters()])
    for ours, theirs in zip([y, *actual], [expected, *exact_grads], strict=True):
        oracles.assert_matches(ours, theirs, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize('kind', NORMS)
def test_under_autocast_a_norm_may_return_what_a_linear_layer_takes_rounded_once(kind):
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        norm, x = norm_and_input(kind, torch.float32, autocast=autocast)
        expected = norm(x)
        assert expected.dtype == torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            y = norm(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize('kind', NORMS)
def test_autocast_leaves_fp64_and_the_meta_device_alone(kind):
    norm, x = norm_and_input(kind, torch.float64, autocast=True)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x).dtype == torch.float64
        meta = norm.float().to('meta')
        assert meta(torch.empty_like(x, device='meta', dtype=torch.float32)).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_norm_of_a_map_returns_channels_last_memory(memory_format):
    norm, x = norm_and_input(LayerNorm2d, torch.float32)
    y = norm(x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=torch.channels_last)
    oracles.assert_matches(y, definition(norm, x), torch.float32)
