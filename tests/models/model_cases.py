"""Small models of each family, and images for them."""

import timm
import torch
from torch import nn

import vmamba  # noqa: F401, registers the models

# Four stages of 8, 16, 32 and 64 channels, or four blocks of 16 channels on patches of 4x4 pixels.
_STAGES = dict(depths=(1, 1, 2, 1), embed_dim=8, num_classes=10)
_TOKENS = dict(depth=4, embed_dim=16, patch_size=4, stride=4, global_pool='token', num_classes=10)
SMALL = {
    'vmamba': ('vmamba_nano', _STAGES),
    'v0': ('vmamba_t_v0', _STAGES),
    'vim': ('vim_nano', dict(_TOKENS, d_state=16)),
    'mambavision': ('mambavision_nano', dict(_STAGES, depths=(1, 1, 2, 2), stem_dim=4, num_heads=2, window_size=2)),
    'vssd': ('vssd_nano', dict(_STAGES, num_heads=(2, 2, 4, 4), d_state=4)),
    'm2': ('vmamba_t_m2', dict(_STAGES, d_state=4)),
    'adventurer': ('adventurer_nano', dict(_TOKENS, d_state=4, headdim=8)),
    'moe': ('vmamba_nano_moe', dict(_STAGES, num_experts=2)),
    'vim-moe': ('vim_nano_moe', dict(_TOKENS, num_experts=2)),
    'vim2': ('vim2_t', dict(_TOKENS, img_size=32, d_state=4, headdim=8)),
}
# Where it is among the 65 tokens of a 32x32 image.
CLASS_TOKENS = {'vim': 32, 'vim2': 32, 'vim-moe': 32, 'adventurer': 64}
STAGES = [family for family in SMALL if family not in CLASS_TOKENS]
CHANNELS = {family: [16] * 4 if family in CLASS_TOKENS else [8, 16, 32, 64] for family in SMALL}
REDUCTIONS = {family: [4] * 4 if family in CLASS_TOKENS else [4, 8, 16, 32] for family in SMALL}
BATCH_NORMS = ['mambavision', 'vssd']
# Families whose blocks run fused on Triton. The other ones are tested in fewer combinations, to save time.
FUSED = ['vmamba', 'v0', 'vim']
MODULES = ['adventurer', 'mambavision', 'vim', 'vmamba', 'vssd']
VARIANTS = timm.list_models(module=MODULES)


def small(family, **kwargs):
    """A small model with weights that differ from layer to layer."""
    name, options = SMALL[family]
    model = timm.create_model(name, **{**options, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained: else deep maps would hardly depend on the image
            module.running_var.fill_(0.1)
    return model


def images(*shape):
    return torch.randn(*(shape or (2, 3, 32, 32)))


def tokens_of(model, x):
    """What the blocks of a Vim are given: the embedded patches with the class token among them."""
    seen = []
    handle = model.blocks.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model(x)
    handle.remove()
    return seen[0]
