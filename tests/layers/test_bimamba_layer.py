"""BiMamba against the definition, computed in float64 from its parameters; both directions matter."""

import copy

import official
import oracles
import pytest
import torch
from torch import nn

from vmamba.layers import BiMamba


def randomised(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def official_entries(name, value):
    """A parameter stacked over the directions as the official pair: conv1d_weight -> conv1d.weight, conv1d_b.weight."""
    if name.endswith('_proj.weight'):
        return {name: value}
    stem, _, kind = name.rpartition('_') if name.endswith(('_weight', '_bias')) else (name, '', '')
    names = (stem, {'A_log': 'A_b_log'}.get(stem, f'{stem}_b'))
    pair = value.unsqueeze(2) if name == 'conv1d_weight' else value
    return {f'{n}.{kind}' if kind else n: tensor for n, tensor in zip(names, pair, strict=True)}


def official_parameters(layer):
    entries = [official_entries(name, value.detach().double()) for name, value in layer.state_dict().items()]
    return {key: value.clone().requires_grad_() for entry in entries for key, value in entry.items()}


def swap_directions(layer):
    """The parameters that are stacked over the directions, exchanged."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith('_proj.weight'):
                parameter.copy_(parameter.flip(0))
    return layer


CASES = [
    pytest.param(dict(dim=12), 17, id='default'),
    pytest.param(dict(dim=20, expand=1.5, d_state=3), 8, id='narrow'),
    pytest.param(dict(dim=6, d_state=1, dt_rank=5, d_conv=2), 5, id='one-state'),
    pytest.param(dict(dim=6, d_conv=7), 3, id='convolution-longer-than-sequence'),
    pytest.param(dict(dim=6, d_conv=1), 4, id='convolution-of-one'),
    pytest.param(dict(dim=6), 1, id='one-token'),
]


@pytest.mark.parametrize('options,seqlen', CASES)
def test_output_and_gradients_follow_the_definition(options, seqlen):
    layer = randomised(BiMamba(**options))
    x = torch.randn(2, seqlen, options['dim'], requires_grad=True)
    wide, parameters = x.detach().double().requires_grad_(), official_parameters(layer)
    y, expected = layer(x), official.bimamba(parameters, wide)
    assert oracles.relative_error(y, expected) < 1e-4
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert oracles.relative_error(x.grad, wide.grad) < 1e-4
    for name, parameter in layer.named_parameters():
        for key, gradient in official_entries(name, parameter.grad).items():
            assert oracles.relative_error(gradient, parameters.pop(key).grad) < 1e-3, key
    assert not parameters


@torch.no_grad()
def test_a_layer_in_double_computes_in_double():
    layer = randomised(BiMamba(12).double())
    x = torch.randn(1, 9, 12, dtype=torch.double)
    assert oracles.relative_error(layer(x), official.bimamba(official_parameters(layer), x)) < 1e-12


def test_every_output_depends_on_every_token():
    layer = randomised(BiMamba(8).double())
    x = torch.randn(1, 11, 8, dtype=torch.double, requires_grad=True)
    for position in range(11):
        (grad,) = torch.autograd.grad(layer(x)[0, position].sum(), x)
        assert (grad[0].abs().amax(dim=-1) > 0).all(), position


@pytest.mark.parametrize('silenced,reaches', [(1, range(5, 11)), (0, range(0, 6))])
def test_each_direction_alone_is_causal_in_its_direction(silenced, reaches):
    """A direction without conv1d weights and bias is silent; the other one carries token 5 to one side only."""
    layer = randomised(BiMamba(8))
    x = torch.randn(1, 11, 8)
    before = layer(x)
    with torch.no_grad():
        layer.conv1d_weight[silenced] = 0
        layer.conv1d_bias[silenced] = 0
    silent = layer(x)
    assert oracles.relative_error(silent, before) > 1e-2, 'both directions matter'
    changed = x.clone()
    changed[0, 5] += 1
    difference = (layer(changed) - silent)[0].abs().amax(dim=-1)
    assert [i for i in range(11) if difference[i] > 0] == list(reaches)


@torch.no_grad()
def test_flipping_the_sequence_swaps_the_directions():
    layer = randomised(BiMamba(8).double())
    swapped = swap_directions(copy.deepcopy(layer))
    x = torch.randn(2, 13, 8, dtype=torch.double)
    assert oracles.relative_error(swapped(x.flip(1)).flip(1), layer(x)) < 1e-10
    assert oracles.relative_error(swapped(x), layer(x)) > 1e-2


@torch.no_grad()
def test_a_palindrome_under_equal_directions_gives_a_palindrome():
    layer = randomised(BiMamba(8).double())
    for name, parameter in layer.named_parameters():
        if not name.endswith('_proj.weight'):
            parameter[1] = parameter[0]
    x = torch.randn(1, 7, 8, dtype=torch.double)
    y = layer(torch.cat([x, x.flip(1)], dim=1))
    assert oracles.relative_error(y.flip(1), y) < 1e-10


@torch.no_grad()
def test_under_autocast_and_in_bfloat16_the_result_is_close():
    layer = randomised(BiMamba(24))
    x = torch.randn(1, 19, 24)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert oracles.relative_error(y, expected) < 3e-2
    assert oracles.relative_error(layer.bfloat16()(x.bfloat16()), expected) < 3e-2


def test_initial_values():
    layer = BiMamba(100)
    torch.testing.assert_close(layer.A_log.detach(), torch.arange(1.0, 17).log().expand(2, 200, 16))
    assert torch.equal(layer.D, torch.ones(2, 200))
    bounds = {'dt_proj_weight': 7**-0.5, 'x_proj_weight': 200**-0.5, 'conv1d_weight': 0.5, 'conv1d_bias': 0.5}
    for name, bound in bounds.items():  # the dt rank is ceil(100 / 16)
        assert 0.95 * bound < getattr(layer, name).abs().max() <= bound, name
    step = nn.functional.softplus(layer.dt_proj_bias)
    assert 1e-3 * 0.999 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 * 1.001


def test_the_directions_start_from_different_values():
    layer = BiMamba(12)
    for name in ('conv1d_weight', 'x_proj_weight', 'dt_proj_weight', 'dt_proj_bias'):
        assert not torch.equal(*getattr(layer, name)), name


def test_device_and_dtype_reach_every_parameter():
    layer = BiMamba(8, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {('meta', torch.bfloat16)}
