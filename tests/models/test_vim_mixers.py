"""Vim with each of its mixers."""

import oracles
import pytest
import timm
import torch

from vmamba.models.vim import MIXERS

OPTIONS = dict(img_size=16, patch_size=4, stride=4, depth=2, embed_dim=16, headdim=8, num_classes=5)


def make(mixer, **options):
    return timm.create_model('vim_nano', mixer=mixer, **{**OPTIONS, 'd_state': 4, **options})


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_token_sees_all_others_and_every_parameter_is_used(mixer):
    block = make(mixer).blocks[0]
    x = torch.randn(1, 7, 16, requires_grad=True)
    for token in (0, 6):
        (grad,) = torch.autograd.grad(block(x)[0, token].square().sum(), x)
        assert grad.abs().amax(dim=-1).min() > 0
    model = make(mixer)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []
    exempt = model.no_weight_decay()
    assert exempt <= {name for name, _ in model.named_parameters()} and 'pos_embed' in exempt


@pytest.mark.parametrize('mixer', MIXERS)
def test_checkpointed_compiled_and_exported_models_give_the_same(mixer):
    model, images = make(mixer, depth=1), torch.randn(2, 3, 16, 16)
    out = model(images)
    grads = torch.autograd.grad(out.square().sum(), list(model.blocks.parameters()))
    model.set_grad_checkpointing()
    recomputed = torch.autograd.grad(model(images).square().sum(), list(model.blocks.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, recomputed))
    model.set_grad_checkpointing(False)
    model.eval()
    exported = torch.export.export(model, (images,)).module()
    assert oracles.relative_error(exported(images), out) < 1e-5
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert oracles.relative_error(compiled(images), out) < 1e-5


def test_unknown_mixers_and_bad_options_are_refused():
    with pytest.raises(ValueError, match="mixer must be one of 'mamba', .*'attention', got 'lstm'"):
        make('lstm')
    with pytest.raises(ValueError, match='d_state must be an integer of at least 1, got 0'):
        make('s4d', d_state=0)
    with pytest.raises(ValueError, match='headdim must divide the 16 channels, got 5'):
        make('attention', headdim=5)
