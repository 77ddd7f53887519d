"""Mamba against the definition, computed in float64 from its parameters, and its steps against whole sequences."""

import copy

import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from mixer_cases import assert_continues, assert_follows, assert_packs
from official_language_model import mamba as definition

from vmamba.kernels import block_step, use_triton
from vmamba.layers import Mamba, mamba

CASES = {
    'default': {},
    'biases': dict(bias=True, expand=1.5, dt_rank=3),
    'wide-convolution': dict(d_conv=6, conv_bias=False, dt_init='constant', dt_scale=0.5),
}


def make(**options):
    layer = Mamba(**{**dict(d_model=8, d_state=5), **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_output_and_gradients_follow_the_definition(options):
    layer = make(**options)
    assert_follows(layer, definition, (2, 9, 8))


@torch.no_grad()
@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_prompts_and_steps_equal_the_whole_sequence(options):
    layer = make(**options).double()
    x = torch.randn(2, 11, 8, dtype=torch.double)
    assert_continues(layer, layer.allocate_cache(2), x, 2, 6)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('options', [*CASES.values(), dict(d_model=21, d_state=16, expand=3)], ids=[*CASES, 'wide'])
def test_steps_in_fused_kernels(options, dtype, monkeypatch):
    """From states after a prompt, of few sequences, equal those of modules; of many, or with a hook, modules run."""
    layer = make(**options).to(DEVICE)
    calls = []
    fused = mamba.mamba_step
    monkeypatch.setattr(block_step, '_PROGRAMS', 8)  # several rows for each
    block_step._product.cache_clear()
    monkeypatch.setattr(mamba, 'mamba_step', lambda *args: calls.append(args) or fused(*args))
    x = torch.randn(3, 7, layer.in_proj.in_features, device=DEVICE)
    wide = copy.deepcopy(layer).double()
    expected, actual = wide.allocate_cache(3), layer.to(dtype).allocate_cache(3)
    wide(x[:, :4].double(), cache=expected)
    for ours, theirs in zip(actual, expected):
        ours.copy_(theirs)
    for number, token in enumerate(x[:, 4:].unbind(dim=1)):
        with use_triton(True):
            y = layer.step(token.to(dtype), actual)
        assert y.dtype == dtype and len(calls) == number + 1
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert oracles.relative_error(y, wide.step(token.double(), expected)) < tolerance
        assert all(oracles.relative_error(a, b) < tolerance for a, b in zip(actual, expected))
    with use_triton(True):
        layer.step(x.new_zeros(9, x.shape[-1], dtype=dtype), layer.allocate_cache(9))
        layer.in_proj.register_forward_hook(lambda *args: None)
        layer.step(x[:, 0].to(dtype), actual)
    assert len(calls) == 3


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_packed_sequences_do_not_see_each_other(options):
    layer = make(**options).double()
    assert_packs(layer, torch.randn(1, 11, 8, dtype=torch.double), [4, 1, 6], tolerance=1e-9)
    with pytest.raises(ValueError, match='give seq_idx or a cache, not both'):
        layer(torch.randn(1, 1, 8).double(), layer.allocate_cache(1), torch.zeros(1, 1))


def test_official_names_and_initialisation():
    layer = Mamba(32, layer_idx=2, use_fast_path=False)
    assert set(layer.state_dict()) == {
        *('A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias', 'x_proj.weight'),
        *('dt_proj.weight', 'dt_proj.bias', 'out_proj.weight'),
    }
    dt = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 1e-4 <= dt.min() and dt.max() <= 0.1 + 1e-6
    assert torch.equal(layer.A_log[0], torch.arange(1, 17).log())
    assert layer.dt_proj.weight.abs().max() <= 2**-0.5
    torch.testing.assert_close(Mamba(32, dt_init='constant').dt_proj.weight.data, torch.full((64, 2), 2**-0.5))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="dt_init must be one of 'random', 'constant', got 'zero'"):
        Mamba(8, dt_init='zero')
    with pytest.raises(ValueError, match='d_state must be an integer of at least 1, got 0'):
        Mamba(8, d_state=0)
    with pytest.raises(ValueError, match='dt_min and dt_max must be positive and ascending, got -1 and 0.1'):
        Mamba(8, dt_min=-1)
