"""The classifier of sequences on every mixer, causal and in both directions."""

import oracles
import pytest
import torch

from vmamba.layers import auxiliary_loss
from vmamba.sequence import SequenceClassifier
from vmamba.sequence.classifier import BIDIRECTIONAL, CAUSAL

SIZES = {
    'mamba': dict(d_state=4),
    'mamba2': dict(d_state=4, headdim=4),
    's4d': dict(d_state=4),
    'h3': dict(d_state=4),
    'attention': dict(num_heads=2),
    'block_state': dict(window=3, num_heads=2, d_state=4),
}
KINDS = [*((name, False) for name in CAUSAL), *((name, True) for name in BIDIRECTIONAL)]


def make(mixer='mamba', **options):
    layer_cfg = {mixer: SIZES[mixer], **options.pop('layer_cfg', {})}
    return SequenceClassifier(
        5, **{**dict(vocab_size=7, layers=[mixer] * 2, d_model=8, layer_cfg=layer_cfg), **options}
    )


@pytest.mark.parametrize(('mixer', 'bidirectional'), KINDS)
def test_positions_see_what_they_should_and_every_parameter_is_used(mixer, bidirectional):
    model = make(mixer, vocab_size=0, bidirectional=bidirectional, outputs=4)
    x = torch.randn(2, 9, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 4, 5)
    (grad,) = torch.autograd.grad(logits[0, 1].square().sum(), x, retain_graph=True)  # of position 6
    assert (grad[0, :7] != 0).all()
    later = grad[0, 7:].abs()
    assert later.min() > 1e-5 if bidirectional else later.max() < 1e-8  # FFTs round
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize('pool', ('mean', 'last'))
def test_pooling_leaves_padding_out(pool):
    model = make(padding=0, pool=pool).double().eval()
    x = torch.randint(1, 7, (3, 9))
    lengths = [9, 4, 1]
    for row, length in zip(x, lengths):
        row[length:] = 0
    logits = model(x)
    for row, length, expected in zip(x, lengths, logits):
        torch.testing.assert_close(model(row[None, :length])[0], expected)


@torch.no_grad()
def test_the_mean_and_the_last_position():
    model, x = make().double(), torch.randint(7, (2, 6))
    by_position = make(outputs=6).double()
    by_position.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), by_position(x).mean(dim=1))
    model.pool = 'last'
    torch.testing.assert_close(model(x), by_position(x)[:, -1])


def test_feed_forwards_and_experts():
    options = dict(
        layers=[['mamba', 'moe'], ['mamba', 'mlp']], layer_cfg={'moe': {'num_experts': 2}, 'mlp': {'d_hidden': 9}}
    )
    model = make(**options)
    model(torch.randint(7, (2, 6)))
    assert auxiliary_loss(model) > 0.005


@torch.no_grad()
def test_autocast_is_close_to_full_precision():
    model, x = make(), torch.randint(7, (2, 6))
    with torch.autocast('cpu', torch.bfloat16):
        assert oracles.relative_error(model(x), model.float()(x)) < 5e-2


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(layers=[]), ValueError, r'layers must be a list of at least one layer, got \[\]'),
        (dict(layers=['lstm']), ValueError, "layer must be one of 'mamba', .*, got 'lstm'"),
        (dict(layers=['block_state'], bidirectional=True), ValueError, "layer must be one of .* got 'block_state'"),
        (dict(layers=[['mamba', 'mpl']]), ValueError, "feed_forward must be one of 'mlp', .* got 'mpl'"),
        (dict(layer_cfg={'h3': {}}), ValueError, "layer_cfg has arguments of 'h3'"),
        (dict(layer_cfg={'mamba': {'dstate': 3}}), TypeError, 'dstate'),
        (dict(pool='max'), ValueError, "pool must be one of 'mean', 'last', got 'max'"),
        (dict(padding=7), ValueError, 'padding must be a symbol below vocab_size=7, or None, got 7'),
        (dict(num_classes=0), ValueError, 'num_classes must be an integer of at least 1, got 0'),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        SequenceClassifier(**{**dict(num_classes=5, vocab_size=7), **options})


def test_wrong_inputs():
    with pytest.raises(ValueError, match='symbols must be from 0 to 6, got 7'):
        make()(torch.tensor([[1, 7]]))
    with pytest.raises(ValueError, match='x must be symbols below 7 with vocab_size=7, got torch.float32'):
        make()(torch.randn(1, 3))
    with pytest.raises(ValueError, match='x must be real numbers with vocab_size=0, got torch.int64'):
        make(vocab_size=0)(torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r'x must be \[B, L\] with L of at least 4, got \(1, 3\)'):
        make(outputs=4)(torch.tensor([[1, 2, 3]]))
