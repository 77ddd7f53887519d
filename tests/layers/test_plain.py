"""Modules whose parameters are used in place of a call on a CPU, and modules that must be called."""

from math import prod

import pytest
import torch
from timm.layers import DropPath, Mlp
from torch import nn
from torch.nn.utils import parametrize

from vmamba.kernels import onednn
from vmamba.layers import SS2D, LayerNorm, residual, residual_branches
from vmamba.layers.plain import apply_linear, apply_mlp

DIM = 12


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Other(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out + 1)
    return module


def parametrized(module):
    parametrize.register_parametrization(module, 'weight', Doubled())
    return module


@pytest.fixture(autouse=True)
def no_threshold(monkeypatch):
    monkeypatch.setattr(onednn, '_MIN_MACS', 0)


@pytest.fixture
def slices(monkeypatch):
    """Slices of three rows; how many there were."""
    monkeypatch.setattr(residual, '_SLICE_ELEMENTS', 3 * 4 * DIM)
    calls, gelu = [], torch.ops.aten.gelu_
    monkeypatch.setattr(torch.ops.aten, 'gelu_', lambda x: calls.append(len(x)) or gelu(x))
    return calls


@pytest.mark.parametrize('bias', [True, False])
def test_a_linear_layer(bias):
    module, x = nn.Linear(DIM, 7, bias=bias), torch.randn(2, 5, DIM)
    torch.testing.assert_close(apply_linear(module, x), module(x))


@pytest.mark.parametrize('change', [hooked, parametrized, lambda module: Other(DIM, 7), lambda module: nn.Identity()])
def test_what_stands_in_a_linear_layers_place_is_called(change):
    module, x = change(nn.Linear(DIM, 7)), torch.randn(2, 5, DIM)
    assert torch.equal(apply_linear(module, x), module(x))


@pytest.mark.parametrize('options', [{}, dict(act_layer=nn.ReLU), dict(norm_layer=nn.LayerNorm), dict(bias=False)])
def test_an_mlp(options):
    mlp, x = Mlp(DIM, 20, **options), torch.randn(2, 5, DIM)
    torch.testing.assert_close(apply_mlp(mlp, x), mlp(x))


def test_an_mlp_drops_in_training():
    mlp, x = Mlp(DIM, 20, drop=0.5), torch.randn(2, 5, DIM)
    torch.manual_seed(0)
    expected = mlp(x)
    torch.manual_seed(0)
    torch.testing.assert_close(apply_mlp(mlp, x), expected)


def test_hooks_inside_an_mlp_see_its_calls():
    mlp, x = Mlp(DIM, 20), torch.randn(2, 5, DIM)
    hooked(mlp.fc1)
    torch.testing.assert_close(apply_mlp(mlp, x), mlp(x))


def branch(drop_path=None, **options):
    module = nn.ModuleList([LayerNorm(DIM), Mlp(DIM, 4 * DIM, **options), drop_path or nn.Identity()]).eval()
    nn.init.normal_(module[0].weight)
    return module


def plain(x, norm, mlp, drop_path):
    return x + drop_path(mlp(norm(x)))


@pytest.mark.parametrize('shape', [(1, 1, DIM), (1, 3, DIM), (2, 2, 2, DIM), (10, DIM), (0, 3, DIM)])
@pytest.mark.parametrize('drop_path', [None, DropPath(0.5)])
def test_mlps_are_sliced_in_inference(shape, drop_path, slices):
    module, x = branch(drop_path), torch.randn(shape)
    given = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(residual_branches(x, module), plain(x, *module))
    assert torch.equal(x, given)
    assert sum(slices) == prod(shape[:-1]) and max(slices, default=0) <= 3


def test_a_map_of_any_strides_is_sliced(slices):
    module, x = branch(), torch.randn(DIM, 3, 5).permute(2, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(residual_branches(x, module), plain(x, *module))
    assert slices == [3] * 5


def mixer(**options):
    return nn.ModuleList([LayerNorm(DIM), SS2D(DIM, **options), nn.Identity()])


@pytest.fixture
def scanned(monkeypatch):
    """Maps that a sliced branch scanned."""
    calls, scan = [], SS2D.scan
    monkeypatch.setattr(SS2D, 'scan', lambda self, x: calls.append(x.shape) or scan(self, x))
    return calls


@pytest.mark.parametrize('options', [{}, dict(ssm_ratio=1.0, d_state=3, conv_bias=True)])
@pytest.mark.parametrize('size', [(1, 1, 1), (2, 3, 5), (0, 2, 2)])
def test_scans_of_maps_are_whole_between_slices_in_inference(size, options, slices, scanned):
    module, x = mixer(**options), torch.randn(*size, DIM)
    given = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(residual_branches(x, module), plain(x, *module))
    assert torch.equal(x, given) and scanned == [(*size, module[1].in_proj.out_features)]


@pytest.mark.parametrize('part', ['in_proj', 'conv2d', 'x_proj', 'out_norm', 'out_proj', None])
def test_scans_of_maps_with_hooks_or_a_gate_are_called(part, scanned):
    module, x = mixer(gate=part is None), torch.randn(2, 3, 5, DIM)
    if part is not None:
        hooked(getattr(module[1], part))
    with torch.inference_mode():
        torch.testing.assert_close(residual_branches(x, module), plain(x, *module))
    assert not scanned


def test_a_block_of_both_branches(slices, scanned):
    mixing, x = mixer(), torch.randn(2, 3, 5, DIM)
    module = branch()
    with torch.inference_mode():
        torch.testing.assert_close(residual_branches(x, mixing, module), plain(plain(x, *mixing), *module))
    assert len(scanned) == 1 and sum(slices) == 30


@pytest.mark.parametrize('change', [lambda m: m, lambda m: hooked(m[1]), lambda m: m[2].train()])
def test_mlps_are_called_whole_in_training_with_hooks_and_where_samples_are_dropped(change, slices):
    module, x = branch(DropPath(0.5)), torch.randn(4, 5, DIM)
    changed = change(module)
    with torch.set_grad_enabled(changed is module):
        torch.manual_seed(0)
        actual = residual_branches(x, module)
        torch.manual_seed(0)
        torch.testing.assert_close(actual, plain(x, *module))
    assert not slices


@pytest.mark.parametrize('change', [lambda x, m: (x, m.bfloat16()), lambda x, m: (x.bfloat16(), m)])
def test_mixed_dtypes_are_left_to_the_modules(change, slices, scanned):
    """In bf16 with a stream in fp32, and the other way round."""
    for module in (branch(), mixer()):
        x, module = change(torch.randn(2, 3, 5, DIM), module)
        with torch.inference_mode():
            assert torch.equal(residual_branches(x, module), plain(x, *module))
    assert not slices and not scanned
