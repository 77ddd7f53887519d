"""SS2D against the definition, computed in float64 from its parameters."""

import official
import oracles
import pytest
import torch
from torch import nn

from vmamba.layers import SS2D


def randomised(module):
    """Values that make every parameter matter."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(('A_log', '.D', 'norm.weight')) or name == 'D':
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def official_parameters(layer):
    """The layer's parameters under the official names, in float64."""
    state = {key: value.detach().double() for key, value in layer.state_dict().items()}
    dim = state['D'].shape[1]
    return {
        **{k: v for k, v in state.items() if k.startswith(('in_proj', 'conv2d', 'out_norm', 'out_proj'))},
        'x_proj_weight': state['x_proj.weight'].view(4, -1, dim),
        'dt_projs_weight': state['dt_proj_weight'],
        'dt_projs_bias': state['dt_proj_bias'],
        'A_logs': state['A_log'].flatten(0, 1),
        'Ds': state['D'].flatten(),
    }


CASES = [
    # options, (H, W), inner channels, dt rank
    pytest.param(dict(dim=12, ssm_ratio=1.0), (5, 7), 12, 1, id='current-s1'),
    pytest.param(dict(dim=18, ssm_ratio=2.0), (7, 4), 36, 2, id='current-s2'),
    pytest.param(dict(dim=10, ssm_ratio=1.5, d_conv=5), (3, 3), 15, 1, id='wide-convolution'),
    pytest.param(dict(dim=12, ssm_ratio=2.0, d_state=16, conv_bias=True, gate=True), (5, 6), 24, 1, id='v0'),
    pytest.param(dict(dim=7, ssm_ratio=1.0, d_state=3, gate=True, dt_rank=4), (1, 9), 7, 4, id='gate-one-row'),
]


@pytest.mark.parametrize('options,size,inner,rank', CASES)
def test_output_and_gradients_follow_the_definition(options, size, inner, rank):
    layer = randomised(SS2D(**options))
    assert layer.dt_proj_weight.shape == (4, inner, rank)
    x = torch.randn(2, *size, options['dim'], requires_grad=True)
    wide = x.detach().double().requires_grad_()
    parameters = {k: v.requires_grad_() for k, v in official_parameters(layer).items()}
    y, expected = layer(x), official.ss2d(parameters, wide)
    assert oracles.relative_error(y, expected) < 1e-4
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert oracles.relative_error(x.grad, wide.grad) < 1e-4
    grads = {
        'in_proj.weight': layer.in_proj.weight.grad,
        'conv2d.weight': layer.conv2d.weight.grad,
        'x_proj_weight': layer.x_proj.weight.grad.view(4, -1, inner),
        'dt_projs_weight': layer.dt_proj_weight.grad,
        'dt_projs_bias': layer.dt_proj_bias.grad,
        'A_logs': layer.A_log.grad.flatten(0, 1),
        'Ds': layer.D.grad.flatten(),
        'out_norm.weight': layer.out_norm.weight.grad,
        'out_norm.bias': layer.out_norm.bias.grad,
        'out_proj.weight': layer.out_proj.weight.grad,
    }
    for name, value in grads.items():
        assert oracles.relative_error(value, parameters[name].grad) < 1e-3, name
    if layer.conv2d.bias is not None:
        assert oracles.relative_error(layer.conv2d.bias.grad, parameters['conv2d.bias'].grad) < 1e-3


@torch.no_grad()
def test_a_layer_in_double_computes_in_double():
    layer = randomised(SS2D(12, d_state=3, gate=True).double())
    x = torch.randn(1, 4, 5, 12, dtype=torch.double)
    assert oracles.relative_error(layer(x), official.ss2d(official_parameters(layer), x)) < 1e-12


@torch.no_grad()
def test_under_autocast_and_in_bfloat16_the_result_is_close():
    layer = randomised(SS2D(24, d_state=16, gate=True))
    x = torch.randn(1, 6, 5, 24)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert oracles.relative_error(y, expected) < 3e-2
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert oracles.relative_error(y, expected) < 3e-2


def test_initial_values():
    layer = SS2D(40, ssm_ratio=2.0, d_state=16)
    expected = torch.arange(1, 17, dtype=torch.float32).log().expand(4, 80, 16)
    torch.testing.assert_close(layer.A_log, nn.Parameter(expected))
    assert torch.equal(layer.D, torch.ones(4, 80))
    bound = 3**-0.5  # dt rank is ceil(40 / 16)
    assert layer.dt_proj_weight.abs().max() <= bound
    assert layer.dt_proj_weight.abs().max() > 0.95 * bound
    step = nn.functional.softplus(layer.dt_proj_bias)
    assert 1e-3 * 0.999 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 * 1.001
    assert abs(step.log().mean() - torch.tensor(1e-4).log() / 2) < 0.25, 'steps are log-uniform'


@pytest.mark.parametrize('options', [dict(d_conv=4), dict(d_conv=2)])
def test_an_even_convolution_is_an_error(options):
    with pytest.raises(ValueError, match=str(options['d_conv'])):
        SS2D(8, **options)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match='forward_type'):
        SS2D(8, forward_type='v05')


def test_device_and_dtype_reach_every_parameter():
    layer = SS2D(8, conv_bias=True, gate=True, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {('meta', torch.bfloat16)}
