"""What tests of all mixers do: compare with a definition in float64, and prompts and steps with whole sequences."""

import oracles
import torch


def assert_follows(layer, definition, shape, tolerance=1e-4):
    """Output and all gradients of a layer against definition(parameters by name, x), of random x [B, L, d]."""
    x = torch.randn(shape, requires_grad=True)
    wide = {key: value.double().requires_grad_() for key, value in layer.state_dict().items()}
    wide_x = x.detach().double().requires_grad_()
    y, expected = layer(x), definition(wide, wide_x)
    assert oracles.relative_error(y, expected) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert oracles.relative_error(x.grad, wide_x.grad) < 1e-4
    for key, parameter in layer.named_parameters():
        assert oracles.relative_error(parameter.grad, wide[key].grad) < tolerance, key


@torch.no_grad()
def assert_continues(layer, cache, x, *ends):
    """Two prompts or more of x [B, L, d], which end at these positions, and a step for each token after them."""
    parts = [layer(part, cache=cache) for part in x[:, : ends[-1]].tensor_split(ends[:-1], dim=1)]
    parts += [layer.step(token, cache).unsqueeze(1) for token in x[:, ends[-1] :].unbind(dim=1)]
    assert oracles.relative_error(torch.cat(parts, dim=1), layer(x)) < 1e-10


def assert_packs(layer, x, sizes, tolerance=1e-10):
    """Sequences of these sizes, packed into one x [1, L, d], against each alone: output and gradient of x."""
    seq_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).unsqueeze(0)
    packed = x.clone().requires_grad_()
    alone = x.clone().requires_grad_()
    y = layer(packed, seq_idx=seq_idx)
    expected = torch.cat([layer(part) for part in alone.split(sizes, dim=1)], dim=1)
    assert oracles.relative_error(y, expected) < tolerance
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, [packed, *layer.parameters()], grad)
    wanted = torch.autograd.grad(expected, [alone, *layer.parameters()], grad)
    assert all(oracles.relative_error(a, b) < tolerance for a, b in zip(actual, wanted))
