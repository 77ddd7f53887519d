"""The mixture of experts against one token at a time in float64."""

import copy

import oracles
import pytest
import torch
import torch.nn.functional as F

from vmamba.layers import SwitchMoE, auxiliary_loss, expert_load

DIM, HIDDEN, EXPERTS = 8, 16, 4


def make(dtype=torch.float32, **options):
    layer = SwitchMoE(DIM, EXPERTS, HIDDEN, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer.to(dtype)


def reference(p, x, capacity=None, aux_weight=0.01, z_weight=0.0):
    """Output [B, L, d] and auxiliary loss, one token after the other; p has the layer's names, in float64."""
    tokens = x.reshape(-1, DIM)
    taken, probabilities, logs, rows = [0] * EXPERTS, [], [], []
    for token in tokens:
        logits = p['router_weight'] @ token
        probability = torch.exp(logits) / torch.exp(logits).sum()
        expert = int(probability.argmax())
        row = probability[expert] * (torch.clamp(token @ p['fc1'][expert], min=0) @ p['fc2'][expert])
        rows.append(row if capacity is None or taken[expert] < capacity else torch.zeros_like(row))
        taken[expert] += 1
        probabilities.append(probability)
        logs.append(torch.log(torch.exp(logits).sum()))
    mean = sum(probabilities) / len(tokens)
    balance = EXPERTS * sum(mean[e] * taken[e] / len(tokens) for e in range(EXPERTS))
    loss = aux_weight * balance + z_weight * sum(log**2 for log in logs) / len(tokens)
    return torch.stack(rows).reshape(x.shape), loss


def compare(layer, x, tolerance, capacity, **weights):
    """Outputs, auxiliary loss and every gradient of a layer in training."""
    wide = {key: value.detach().double().requires_grad_() for key, value in layer.named_parameters()}
    wide_x = x.detach().double().requires_grad_()
    expected, expected_loss = reference(wide, wide_x, capacity, **weights)
    y = layer(x)
    loss = auxiliary_loss(layer)
    assert oracles.relative_error(y, expected) < tolerance
    assert oracles.relative_error(loss, expected_loss) < tolerance
    grad = torch.randn_like(expected)
    ((y * grad).sum() + 3 * loss).backward()
    ((expected * grad).sum() + 3 * expected_loss).backward()
    assert oracles.relative_error(x.grad, wide_x.grad) < tolerance
    for key, parameter in layer.named_parameters():
        assert oracles.relative_error(parameter.grad, wide[key].grad) < tolerance, key


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    ('factor', 'capacity', 'weights'),
    [(None, None, {}), (1.0, 5, dict(aux_weight=0.5)), (0.5, 2, dict(z_weight=0.1))],
    ids=('unlimited', 'capacity', 'small-capacity'),
)
def test_output_loss_and_gradients_follow_the_definition(factor, capacity, weights, dtype):
    layer = make(dtype, capacity_factor=factor, **weights)
    x = torch.randn(3, 7, DIM, dtype=dtype, requires_grad=True)
    compare(layer, x, 1e-5, capacity, **weights)
    load = layer.expert_load
    assert abs(load.sum() - 1) < 1e-6 and (capacity is None or load.max() > capacity / 21)  # tokens were dropped


@pytest.mark.skipif(not hasattr(F, 'grouped_mm'), reason='needs a PyTorch with grouped products')
def test_grouped_products_follow_the_definition(monkeypatch):
    calls = []
    grouped = F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', lambda *args, **options: calls.append(1) or grouped(*args, **options))
    layer = make(torch.bfloat16)
    x = torch.randn(3, 7, DIM).bfloat16().requires_grad_()
    layer.router_weight.data *= 4  # far from ties
    compare(layer, x, 3e-2, 5)
    assert len(calls) == 6  # two, and twice as many in the backward pass


def test_the_layer_is_one_graph():
    compiled = torch.compile(make(torch.bfloat16), backend='aot_eager', fullgraph=True)
    x = torch.randn(5, 6, DIM).bfloat16().requires_grad_()
    (compiled(x).sum() + auxiliary_loss(compiled)).backward()
    assert x.grad.isfinite().all() and compiled.router_weight.grad.abs().max() > 0


def test_autocast_keeps_the_router_in_fp32():
    layer = make(capacity_factor=None)
    x = torch.randn(2, 50, DIM)
    expected = layer(x)
    chosen = layer.expert_load
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and oracles.relative_error(y, expected) < 2e-2
    assert torch.equal(chosen, layer.expert_load) and layer.loss.dtype == torch.float32


@torch.no_grad()
def test_evaluation_and_single_tokens_drop_nothing():
    layer = make(capacity_factor=0.5)
    x = torch.randn(2, 9, DIM)
    assert (layer(x) == 0).all(dim=-1).any()  # in training, some are
    layer.eval()
    y = layer(x)
    assert oracles.relative_error(y, reference(dict(layer.double().named_parameters()), x.double())[0]) < 1e-5
    layer.float()
    for position in range(9):
        torch.testing.assert_close(layer(x[:, position]), y[:, position])
    assert auxiliary_loss(layer) == 0.0


def test_losses_are_summed_over_layers_and_read_once():
    model = torch.nn.Sequential(make(), make())
    model(torch.randn(4, 6, DIM))
    losses = [layer.loss for layer in model]
    assert copy.deepcopy(model)[0].loss is None
    torch.testing.assert_close(auxiliary_loss(model), losses[0] + losses[1])
    assert auxiliary_loss(model) == 0.0
    loads = expert_load(model)
    assert list(loads) == ['0', '1'] and all(load.shape == (EXPERTS,) for load in loads.values())


def test_balanced_experts_have_the_least_loss():
    layer = make(capacity_factor=None)
    torch.nn.init.zeros_(layer.router_weight)
    layer(torch.randn(40, DIM))
    torch.testing.assert_close(auxiliary_loss(layer), torch.tensor(0.01))


def test_initial_weights():
    layer = SwitchMoE(64, 8)
    assert layer.fc1.shape == (8, 64, 192) and layer.fc2.shape == (8, 192, 64) and layer.router_weight.shape == (8, 64)
    for weight, fan_in in ((layer.router_weight, 64), (layer.fc1, 64), (layer.fc2, 8 * 192)):
        assert abs(weight.std() / (0.1 / fan_in) ** 0.5 - 1) < 0.1 and weight.abs().max() <= 0.2
    assert SwitchMoE(1, 8).fc1.abs().max() <= 0.2 < (0.1 / 1) ** 0.5


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32), ids=str)
def test_experts_without_tokens_have_no_gradient(dtype):
    layer = make(dtype, capacity_factor=None)
    layer.router_weight.data[1:] = 0
    layer.router_weight.data[0] = 1
    layer(torch.rand(10, DIM, dtype=dtype)).sum().backward()
    assert layer.expert_load.tolist() == [1, 0, 0, 0]
    assert layer.fc1.grad[0].abs().max() > 0 and (layer.fc1.grad[1:] == 0).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_experts=0), 'num_experts must be an integer of at least 1, got 0'),
        (dict(capacity_factor=0), 'capacity_factor must be above 0, or None for no limit, got 0'),
        (dict(aux_weight=-1), 'aux_weight must be at least 0, got -1'),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwitchMoE(DIM, **{'num_experts': EXPERTS, **options})


@pytest.mark.parametrize(('tokens', 'factor'), [(3, 1.0), (3, 2.0), (6, 0.5)])
def test_too_few_tokens_are_refused_in_training(tokens, factor):
    layer = make(capacity_factor=factor)
    with pytest.raises(ValueError, match=f'{tokens} tokens are too few for 4 experts with capacity_factor={factor}'):
        layer(torch.randn(1, tokens, DIM))
    layer.eval()(torch.randn(1, tokens, DIM))
