"""The residual stream: its norms, its sum, and the samples that stochastic depth drops; and the norm of maps."""

import oracles
import pytest
import torch
from timm.layers import DropPath
from torch import nn

from vmamba.layers import AddLayerNorm, AddRmsNorm, FusedLayerNorm2d, ResidualStream
from vmamba.layers.residual import add_branch, drop_path_scale

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NORMS = [pytest.param(AddRmsNorm, id='rms'), pytest.param(AddLayerNorm, id='layer')]


def norm_and_stream(kind, dtype, **options):
    """A norm, and a stream whose second sample adds nothing."""
    norm = kind(12, dtype=dtype, **options)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    residual = torch.randn(3, 5, 12, dtype=torch.promote_types(dtype, torch.float32)) * 1e-2
    return norm, ResidualStream(torch.randn(3, 5, 12).to(dtype), residual, torch.tensor([1.25, 0, 1.25]))


def definition(norm, x):
    parameters = [parameter.double() for parameter in norm.parameters()]
    return (oracles.rms_norm if isinstance(norm, AddRmsNorm) else oracles.layer_norm)(x, *parameters)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', NORMS)
def test_the_norm_of_a_tensor(kind, dtype):
    """Computes in the tensor's dtype, returns the weight's."""
    norm, stream = norm_and_stream(kind, dtype)
    y = norm(stream.residual)
    assert y.dtype == dtype
    oracles.assert_matches(y, definition(norm, stream.residual.double()), dtype)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', NORMS)
def test_the_norm_of_a_stream_adds_first(kind, dtype):
    norm, stream = norm_and_stream(kind, dtype)
    y, total = norm(stream)
    expected = stream.residual.double().clone()
    expected[::2] += 1.25 * stream.hidden[::2].double()
    assert (y.dtype, total.dtype) == (dtype, stream.residual.dtype)
    oracles.assert_matches(total, expected, total.dtype)
    oracles.assert_matches(y, definition(norm, expected), dtype)
    assert torch.equal(stream.total(), total)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', NORMS)
def test_a_stream_starts_with_what_it_is_made_of(kind, dtype):
    norm, stream = norm_and_stream(kind, dtype)
    y, total = norm(ResidualStream(stream.hidden))
    assert total.dtype == stream.residual.dtype
    assert torch.equal(total, stream.hidden.to(total.dtype))
    assert torch.equal(y, norm(stream.hidden))
    assert torch.equal(ResidualStream(stream.hidden).total(), stream.hidden)


@torch.no_grad()
@pytest.mark.parametrize('kind', NORMS)
def test_under_autocast_the_norm_returns_what_a_linear_layer_takes(kind):
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        norm, stream = norm_and_stream(kind, torch.float32, autocast=autocast)
        expected = norm(stream)[0]
        assert expected.dtype == torch.float32
        with torch.autocast('cpu', torch.bfloat16):
            y, total = norm(stream)
        assert (y.dtype, total.dtype) == (dtype, torch.float32)
        assert torch.equal(y, expected.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize('kind', NORMS)
def test_autocast_leaves_fp64_and_the_meta_device_alone(kind):
    norm, stream = norm_and_stream(kind, torch.float64, autocast=True)
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


@torch.no_grad()
@pytest.mark.parametrize('shape', [(3, 4), (3, 5, 4), (3, 2, 5, 4)], ids=str)
def test_the_sum_of_a_stream_scales_the_samples(shape):
    hidden, residual = torch.randn(2, *shape)
    total = ResidualStream(hidden, residual, torch.tensor([2.0, 0, 0.5])).total()
    expected = torch.stack([residual[0] + 2 * hidden[0], residual[1], residual[2] + hidden[2] / 2])
    assert oracles.relative_error(total, expected) < 1e-6
    assert total.is_contiguous()


@torch.no_grad()
def test_what_stands_in_drop_paths_place_is_called():
    norm, x, seen = AddLayerNorm(4), torch.randn(2, 3, 4), []
    for drop_path in (nn.Hardtanh(0, 0.1), DropPath(0.5)):
        drop_path.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
        for y in (add_branch(x, norm, torch.sin, drop_path), add_branch(ResidualStream(x), norm, torch.sin, drop_path)):
            added, out = seen.pop()
            assert torch.equal(added, norm(x).sin())
            assert torch.equal(y.total() if isinstance(y, ResidualStream) else y, x + out)


@torch.no_grad()
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_a_sum_of_tensors_keeps_their_dtype(dtype):
    x = torch.randn(4, 3, 12).to(dtype)
    norm = AddLayerNorm(12, dtype=dtype)
    y = add_branch(x, norm, torch.sin, DropPath(0.5).train())
    assert y.dtype == dtype
    for sample, added, before in zip(y, norm(x).sin(), x):
        assert torch.equal(sample, before) or oracles.relative_error(sample, before + 2 * added) < 1e-2


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_the_norm_of_a_map_is_over_its_channels(dtype):
    norm, x = FusedLayerNorm2d(12, dtype=dtype), torch.randn(2, 12, 3, 5).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    y = norm(x)
    expected = oracles.layer_norm(x.movedim(1, -1).double(), norm.weight.double(), norm.bias.double()).movedim(-1, 1)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    oracles.assert_matches(y, expected, dtype)


@torch.no_grad()
@pytest.mark.parametrize('autocast,dtype', [(False, torch.float32), (True, torch.bfloat16)], ids=['off', 'on'])
def test_under_autocast_the_norm_of_a_map_rounds_once(autocast, dtype):
    norm, x = FusedLayerNorm2d(12, autocast=autocast), torch.randn(2, 12, 3, 5).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        y = norm(x)
    assert y.dtype == dtype
    assert torch.equal(y, norm(x.float()).to(dtype))
