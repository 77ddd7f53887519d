"""Convolutions with BatchNorm, activation, DropPath and residual: one kernel against the modules."""

import copy

import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from timm.layers import BatchNormAct2d, DropPath
from torch import nn

from vmamba.kernels import use_triton
from vmamba.layers import ConvNorm, ImageConv2d, conv_norm, conv_norms

pytestmark = needs_triton


def make(dtype=torch.float32):
    """Layers on maps of 6 channels: with a bias and GELU; of stride 2; 1x1 without an activation; without a norm."""
    layers = [
        ConvNorm(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU(approximate='tanh'), DropPath(0.5)),
        ConvNorm(ImageConv2d(5, 7, 3, stride=2, padding=1), BatchNormAct2d(7, eps=1e-3)),
        ConvNorm(nn.Conv2d(7, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False), drop_path=nn.Identity()),
        ConvNorm(nn.Conv2d(6, 6, 3, padding=1, groups=6), act=nn.ReLU()),
    ]
    for norm in (layer.norm for layer in layers[:3]):
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            if tensor is not None:
                tensor.data.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    modules = nn.ModuleList(module for layer in layers for module in layer if module is not None)
    modules.eval().to(DEVICE, dtype)
    return layers


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """cuDNN's, which are of tf32 by default: then slices of a batch differ by more than rounding."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel is called with."""
    seen, run = [], conv_norm.batch_norm_
    monkeypatch.setattr(conv_norm, 'batch_norm_', lambda *args, **kwargs: seen.append(kwargs) or run(*args, **kwargs))
    return seen


def both(x, *layers, **options):
    with use_triton(False):
        expected = conv_norms(x, *layers, **options)
    with use_triton(True):
        return conv_norms(x, *layers, **options), expected


@torch.no_grad()
@pytest.mark.parametrize('slice_bytes', [2**20, 1500], ids=['whole', 'sliced'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_the_kernel_gives_what_the_modules_give(dtype, slice_bytes, calls, monkeypatch):
    monkeypatch.setattr(conv_norm, '_SLICE_BYTES', slice_bytes)
    x = torch.randn(5, 6, 9, 7, device=DEVICE, dtype=dtype)
    before, layers = x.clone(), make(dtype)
    actual, expected = both(x, *layers)
    assert len(calls) == (4 if slice_bytes > 1500 else 12 if dtype == torch.float16 else 20)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    assert oracles.relative_error(actual, expected) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize('slice_bytes', [2**20, 1500], ids=['whole', 'sliced'])
def test_a_residual_is_added(slice_bytes, calls, monkeypatch):
    monkeypatch.setattr(conv_norm, '_SLICE_BYTES', slice_bytes)
    first = make()[0]
    last = ConvNorm(nn.Conv2d(5, 6, 3, padding=1).to(DEVICE), nn.BatchNorm2d(6).eval().to(DEVICE))
    x = torch.randn(4, 6, 5, 7, device=DEVICE)
    before = x.clone()
    actual, expected = both(x, first, last, residual=True)
    assert oracles.relative_error(actual, expected) < 1e-6 and torch.equal(x, before)
    assert len(calls) == (2 if slice_bytes > 1500 else 4)
    with torch.autocast(DEVICE, torch.bfloat16):  # of which the residual's dtype is another: in the modules
        actual, expected = both(x, first, last, residual=True)
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)
        assert len(calls) == (2 if slice_bytes > 1500 else 4)
        actual, expected = both(x.bfloat16(), first, last, residual=True)
        assert actual.dtype == torch.bfloat16 and oracles.relative_error(actual, expected) < 2e-2
    assert len(calls) > (2 if slice_bytes > 1500 else 4)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:overflow')  # of the interpreter
def test_extreme_and_missing_numbers_stay(calls):
    gelu, relu, *_ = make()
    for layer, channels in ((relu, 5), (gelu, 6)):
        x = torch.randn(1, channels, 4, 4, device=DEVICE) * 1e15
        x[0, 0, 0, 0] = float('nan')
        actual, expected = both(x, layer)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        assert actual.isnan().any()
    assert len(calls) == 2


def test_gradients_and_training_are_those_of_the_modules(calls):
    """In evaluation and in training, where the statistics are of the batch."""
    x = torch.randn(2, 6, 9, 7, device=DEVICE)
    for training in (False, True):
        layers = make()
        results = []
        for triton in (False, True):
            copies = [ConvNorm(*copy.deepcopy(tuple(layer))) for layer in layers]
            for module in (module for layer in copies for module in layer if module is not None):
                module.train(training)
            torch.manual_seed(0)
            leaf = x.clone().requires_grad_()
            with use_triton(triton):
                conv_norms(leaf, *copies).square().sum().backward()
            results.append([leaf.grad, *(p.grad for p in copies[0].conv.parameters()), copies[0].norm.running_mean])
        assert all(torch.equal(*pair) for pair in zip(*results))
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize('name', ['conv', 'norm', 'act', 'drop_path'])
def test_hooks_are_called(name, calls):
    layer, seen = make()[0], []
    x = torch.randn(2, 6, 9, 7, device=DEVICE)
    handle = getattr(layer, name).register_forward_hook(lambda *args: seen.append(args))
    actual, expected = both(x, layer)
    assert torch.equal(actual, expected) and len(seen) == 2 and not calls
    handle.remove()
    assert oracles.relative_error(both(x, layer)[0], expected) < 1e-6 and len(calls) == 1


@torch.no_grad()
def test_other_modules_are_called(calls):
    conv, norm, act, drop_path = make()[0]
    x = torch.randn(2, 6, 9, 7, device=DEVICE)
    others = [
        ConvNorm(nn.Sequential(conv), norm, act),
        ConvNorm(conv, nn.BatchNorm2d(5).to(DEVICE), act),  # in training
        ConvNorm(conv, nn.BatchNorm2d(5, track_running_stats=False).eval().to(DEVICE), act),
        ConvNorm(conv, norm, nn.GELU()),
        ConvNorm(conv, BatchNormAct2d(5).eval().to(DEVICE), act),  # of two activations
    ]
    for layer in others:
        actual, expected = both(x, layer)
        torch.testing.assert_close(actual, expected)
    assert not calls
