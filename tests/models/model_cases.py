"""Small models of each family, and images for them."""

import timm
import torch

import vmamba  # noqa: F401, registers the models

SMALL = {
    'vmamba': ('vmamba_nano', dict(embed_dim=8, num_classes=10)),
    'v0': ('vmamba_t_v0', dict(depths=(1, 1, 2, 1), embed_dim=8, num_classes=10)),
    'vim': ('vim_nano', dict(embed_dim=16, d_state=16, patch_size=4, stride=4, global_pool='token', num_classes=10)),
}


def small(family, **kwargs):
    """A small model with weights that differ from layer to layer."""
    name, options = SMALL[family]
    return timm.create_model(name, **{**options, **kwargs})


def images(*shape):
    return torch.randn(*(shape or (2, 3, 32, 32)))


def tokens_of(model, x):
    """What the blocks of a Vim are given: the embedded patches with the class token among them."""
    seen = []
    handle = model.blocks.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model(x)
    handle.remove()
    return seen[0]
