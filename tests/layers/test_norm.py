"""The residual stream: its norm, its sum, and the samples that stochastic depth drops."""

import oracles
import pytest
import torch
from timm.layers import DropPath
from torch import nn

from vmamba.layers import AddRmsNorm, ResidualStream, drop_path_scale

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def norm_and_stream(dtype, **options):
    """A norm, and a stream whose second sample adds nothing."""
    norm = AddRmsNorm(12, dtype=dtype, **options)
    nn.init.normal_(norm.weight)
    residual = torch.randn(3, 5, 12, dtype=torch.promote_types(dtype, torch.float32)) * 1e-2
    return norm, ResidualStream(torch.randn(3, 5, 12).to(dtype), residual, torch.tensor([1.25, 0, 1.25]))


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_the_norm_of_a_tensor(dtype):
    """Computes in the tensor's dtype, returns the weight's."""
    norm, stream = norm_and_stream(dtype)
    y = norm(stream.residual)
    assert y.dtype == dtype
    oracles.assert_matches(y, oracles.rms_norm(stream.residual.double(), norm.weight.double()), dtype)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_the_norm_of_a_stream_adds_first(dtype):
    norm, stream = norm_and_stream(dtype)
    y, total = norm(stream)
    expected = stream.residual.double().clone()
    expected[::2] += 1.25 * stream.hidden[::2].double()
    assert (y.dtype, total.dtype) == (dtype, stream.residual.dtype)
    oracles.assert_matches(total, expected, total.dtype)
    oracles.assert_matches(y, oracles.rms_norm(expected, norm.weight.double()), dtype)
    assert torch.equal(stream.total(), total)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_a_stream_starts_with_what_it_is_made_of(dtype):
    norm, stream = norm_and_stream(dtype)
    y, total = norm(ResidualStream(stream.hidden))
    assert total.dtype == stream.residual.dtype
    assert torch.equal(total, stream.hidden.to(total.dtype))
    assert torch.equal(y, norm(stream.hidden))
    assert torch.equal(ResidualStream(stream.hidden).total(), stream.hidden)


@torch.no_grad()
def test_under_autocast_the_norm_returns_what_a_linear_layer_takes():
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        norm, stream = norm_and_stream(torch.float32, autocast=autocast)
        expected = norm(stream)[0]
        assert expected.dtype == torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            y, total = norm(stream)
        assert (y.dtype, total.dtype) == (dtype, torch.float32)
        assert torch.equal(y, expected.to(dtype))


@torch.no_grad()
def test_autocast_leaves_fp64_and_the_meta_device_alone():
    norm, stream = norm_and_stream(torch.float64, autocast=True)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(stream)[0].dtype == torch.float64
        meta = norm.float().to('meta')
        assert meta(torch.empty(1, 2, 12, device='meta')).dtype == torch.float32


def test_samples_are_dropped_at_the_rate_and_the_others_scaled():
    for scale_by_keep, kept in ((True, 1 / 0.7), (False, 1.0)):
        scale = drop_path_scale(DropPath(0.3, scale_by_keep), torch.randn(4000, 2, 3).bfloat16())
        assert (scale.shape, scale.dtype) == ((4000,), torch.float32)
        dropped = scale == 0
        assert 0.27 < dropped.float().mean() < 0.33
        assert torch.allclose(scale[~dropped], torch.tensor(kept))


def test_at_a_rate_of_one_all_samples_are_dropped():
    assert torch.equal(drop_path_scale(DropPath(1.0), torch.randn(5, 2, 3)), torch.zeros(5))


@pytest.mark.parametrize('module', [DropPath(0.3).eval(), DropPath(0.0), nn.Identity()], ids=['eval', 'zero', 'none'])
def test_no_scale_where_nothing_is_dropped(module):
    assert drop_path_scale(module, torch.randn(4, 2, 3)) is None
