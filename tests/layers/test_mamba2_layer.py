"""Mamba2 against the definition, computed in float64 from its parameters, and its steps against whole sequences."""

import official_mamba2 as official
import oracles
import pytest
import torch
from mixer_cases import assert_continues, assert_follows
from torch import nn

from vmamba.layers import Mamba2

SMALL = dict(d_model=12, d_state=5, headdim=4)
CASES = {
    'default': {},
    'groups': dict(ngroups=3),
    'skip-per-channel': dict(D_has_hdim=True),
    'norm-before-gate': dict(norm_before_gate=True, ngroups=2),
    'no-norm': dict(rmsnorm=False, bias=True),
    'mlp-beside': dict(d_ssm=16, ngroups=2, bias=True),
    'limited-steps': dict(dt_limit=(0.02, 0.3)),
    'wide-convolution': dict(d_conv=6, conv_bias=False),
    'no-history': dict(d_conv=1, expand=1),
}


def make(**options):
    layer = Mamba2(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def reference_of(options):
    kept = {k: v for k, v in options.items() if k in ('ngroups', 'dt_limit', 'norm_before_gate')}
    return lambda p, h: official.mamba2(p, h, headdim=4, d_state=5, **kept)


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_output_and_gradients_follow_the_definition(options):
    layer = make(**options)
    assert_follows(layer, reference_of(options), (2, 9, 12))


@torch.no_grad()
@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_a_prompt_and_steps_equal_the_whole_sequence(options):
    layer = make(**options).double()
    x = torch.randn(2, 11, 12, dtype=torch.double)
    whole = layer(x)
    assert_continues(layer, layer.allocate_cache(2), x, 2, 6)
    assert oracles.relative_error(layer(x[:, :7], cache=layer.allocate_cache(2)), whole[:, :7]) < 1e-10


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    layer = make(ngroups=2).double()
    x, seq_idx = torch.randn(1, 10, 12, dtype=torch.double), torch.tensor([[0] * 3 + [1] * 2 + [2] * 5])
    parts = torch.cat([layer(part) for part in x.split([3, 2, 5], dim=1)], dim=1)
    assert oracles.relative_error(layer(x, seq_idx), parts) < 1e-10
    assert oracles.relative_error(layer(x), parts) > 1e-3
    with pytest.raises(ValueError, match='seq_idx or a cache, not both'):
        layer(x, seq_idx, layer.allocate_cache(1))


@torch.no_grad()
def test_steps_after_a_prompt_under_autocast_and_in_bfloat16():
    layer = make(d_model=24, headdim=8)
    x = torch.randn(2, 9, 24)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert oracles.relative_error(layer(x), expected) < 3e-2
    brief = layer.bfloat16()
    cache = brief.allocate_cache(2)
    assert (cache.conv.dtype, cache.ssm.dtype) == (torch.bfloat16, torch.float32)
    first = brief(x[:, :8].bfloat16(), cache=cache)
    last = brief.step(x[:, 8].bfloat16(), cache)
    assert first.dtype == last.dtype == torch.bfloat16
    assert oracles.relative_error(torch.cat([first, last[:, None]], dim=1), expected) < 3e-2


def test_official_parameters():
    """The names and shapes of mamba_ssm's layer, whose positional arguments and unused options are accepted too."""
    layer = Mamba2(32, 128, 4, ngroups=2, headdim=16, use_mem_eff_path=False, layer_idx=3, chunk_size=64, device='meta')
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        'in_proj.weight': (2 * 64 + 2 * 2 * 128 + 4, 32),
        'conv1d.weight': (64 + 2 * 2 * 128, 1, 4),
        'conv1d.bias': (64 + 2 * 2 * 128,),
        'dt_bias': (4,),
        'A_log': (4,),
        'D': (4,),
        'norm.weight': (64,),
        'out_proj.weight': (32, 64),
    }
    assert layer.layer_idx == 3
    bare = Mamba2(16, headdim=8, rmsnorm=False, bias=True, conv_bias=False, D_has_hdim=True, dtype=torch.bfloat16)
    assert 'norm.weight' not in bare.state_dict() and 'conv1d.bias' not in bare.state_dict()
    assert len(bare.state_dict()) == 8 and bare.D.shape == (32,)
    assert {p.dtype for p in bare.parameters()} == {torch.bfloat16}


def test_initial_values():
    layer = Mamba2(256, headdim=2, A_init_range=(2, 5), dt_min=0.01, dt_max=0.2, conv_init=0.1)
    step = nn.functional.softplus(layer.dt_bias)
    assert 0.0099 < step.min() < 0.015 and 0.15 < step.max() < 0.201
    assert 2 <= layer.A_log.exp().min() < 2.1 and 4.9 < layer.A_log.exp().max() <= 5.001
    assert 0.09 < layer.conv1d.weight.abs().max() <= 0.1 and (layer.D == 1).all() and (layer.norm.weight == 1).all()


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(headdim=5), 'headdim must divide the 24 channels of the scan, got 5'),
        (dict(ngroups=4), 'ngroups must divide the 6 heads, got 4'),
        (dict(d_ssm=28), 'd_ssm must be at most the 24 inner channels, got 28'),
        (dict(d_state=0), 'd_state .* got 0'),
        (dict(dt_limit=(1, 0)), r'dt_limit must be the smallest and the largest step size, got \(1, 0\)'),
        (dict(dt_min=0.2), 'dt_min and dt_max must be positive and ascending, got 0.2 and 0.1'),
        (dict(A_init_range=(0, 4)), r'A_init_range must be positive and ascending, got \(0, 4\)'),
    ],
)
def test_options_that_make_no_layer_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**{**SMALL, **options})
