"""Small blocks of each family with parameters that all matter, and what they are run on."""

import torch
from cases import DEVICE

from vmamba.models.vim import VimBlock
from vmamba.models.vmamba import VMambaBlock

SHAPES = {'vmamba': (3, 2, 3, 8), 'v0': (3, 3, 2, 6), 'vim': (3, 5, 6)}
BRANCHES = {'vmamba': ('SS2DBranch', 'MlpBranch'), 'v0': ('SS2DBranch',), 'vim': ('BiMambaBranch',)}


def make_block(family, drop_path=0.4, **options):
    """A block in training mode."""
    dim = SHAPES[family][-1]
    if family == 'vim':
        block = VimBlock(dim, d_state=2, drop_path=drop_path, **options)
    elif family == 'v0':
        block = VMambaBlock(dim, d_state=2, conv_bias=True, gate=True, mlp_ratio=0.0, drop_path=drop_path, **options)
    else:
        block = VMambaBlock(dim, ssm_ratio=1.0, mlp_ratio=2.0, drop_path=drop_path, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block.to(DEVICE)


def make_input(family):
    return torch.randn(SHAPES[family], device=DEVICE, requires_grad=True)


def branches_of(block):
    """Triples of a norm, a module and a drop path."""
    if hasattr(block, 'norm'):
        return [(block.norm, block.mixer, block.drop_path)]
    first = block.norm1, block.mixer, block.drop_path1
    return [first, (block.norm2, block.mlp, block.drop_path2)] if block.has_mlp else [first]


def branches_without(block, family, module):
    """Names of the branches that a module of the block is no part of."""
    parts = [{part for member in branch for part in member.modules()} for branch in branches_of(block)]
    return [name for name, modules in zip(BRANCHES[family], parts) if module not in modules]
