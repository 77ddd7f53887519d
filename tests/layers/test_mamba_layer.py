"""Mamba against the definition, computed in float64 from its parameters, and its steps against whole sequences."""

import pytest
import torch
from mixer_cases import assert_continues, assert_follows, assert_packs
from official_language_model import mamba

from vmamba.layers import Mamba

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
    assert_follows(layer, mamba, (2, 9, 8))


@torch.no_grad()
@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
def test_prompts_and_steps_equal_the_whole_sequence(options):
    layer = make(**options).double()
    x = torch.randn(2, 11, 8, dtype=torch.double)
    assert_continues(layer, layer.allocate_cache(2), x, 2, 6)


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
