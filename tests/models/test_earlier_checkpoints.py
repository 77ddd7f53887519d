"""Weights that earlier versions of this library saved still load: the names that they had then, and their shapes."""

import pytest
import timm
import torch

import vmamba  # noqa: F401, registers the models

BIMAMBA = {
    'mixer.conv1d_weight': (2, 16, 4),
    'mixer.conv1d_bias': (2, 16),
    'mixer.x_proj_weight': (2, 9, 16),
    'mixer.dt_proj_weight': (2, 16, 1),
    'mixer.dt_proj_bias': (2, 16),
    'mixer.A_log': (2, 16, 4),
    'mixer.D': (2, 16),
    'mixer.in_proj.weight': (32, 16),
    'mixer.out_proj.weight': (16, 16),
}


def ss2d(dim, inner, states, gate):
    return {
        'norm1.weight': (dim,),
        'norm1.bias': (dim,),
        'mixer.dt_proj_weight': (4, inner, 1),
        'mixer.dt_proj_bias': (4, inner),
        'mixer.A_log': (4, inner, states),
        'mixer.D': (4, inner),
        'mixer.in_proj.weight': (inner * (1 + gate), dim),
        'mixer.conv2d.weight': (inner, 1, 3, 3),
        **({'mixer.conv2d.bias': (inner,)} if gate else {}),
        'mixer.x_proj.weight': (4 * (1 + 2 * states), inner),
        'mixer.out_norm.weight': (inner,),
        'mixer.out_norm.bias': (inner,),
        'mixer.out_proj.weight': (dim, inner),
    }


def mlp(dim):
    return {
        'norm2.weight': (dim,),
        'norm2.bias': (dim,),
        'mlp.fc1.weight': (4 * dim, dim),
        'mlp.fc1.bias': (4 * dim,),
        'mlp.fc2.weight': (dim, 4 * dim),
        'mlp.fc2.bias': (dim,),
    }


def inside(prefix, shapes):
    return {f'{prefix}.{name}': shape for name, shape in shapes.items()}


def affine(name, dim):
    return {f'{name}.weight': (dim,), f'{name}.bias': (dim,)}


# In the order of their state dicts.
EARLIER = {
    'vim': ('vim_nano', dict(depth=1, embed_dim=16, img_size=16), {
        'embed.cls_token': (1, 1, 16),
        'embed.pos_embed': (1, 10, 16),
        'embed.proj.weight': (16, 3, 8, 8),
        'embed.proj.bias': (16,),
        'blocks.0.norm.weight': (16,),
        **inside('blocks.0', BIMAMBA),
        'blocks.0.ls.gamma': (16,),
        'norm.weight': (16,),
        'head.weight': (3, 16),
        'head.bias': (3,),
    }),
    'vmamba': ('vmamba_nano', dict(depths=(1, 1), embed_dim=8), {
        'stem.conv1.weight': (4, 3, 3, 3),
        'stem.conv1.bias': (4,),
        **affine('stem.norm1', 4),
        'stem.conv2.weight': (8, 4, 3, 3),
        'stem.conv2.bias': (8,),
        **affine('stem.norm2', 8),
        **inside('stages.0.blocks.0', {**ss2d(8, 16, 1, gate=False), **mlp(8)}),
        'stages.1.downsample.conv.weight': (16, 8, 3, 3),
        'stages.1.downsample.conv.bias': (16,),
        **affine('stages.1.downsample.norm', 16),
        **inside('stages.1.blocks.0', {**ss2d(16, 32, 1, gate=False), **mlp(16)}),
        **affine('norm', 16),
        'head.fc.weight': (3, 16),
        'head.fc.bias': (3,),
    }),
    'v0': ('vmamba_t_v0', dict(depths=(1, 1), embed_dim=4, d_state=2), {
        'stem.conv.weight': (4, 3, 4, 4),
        'stem.conv.bias': (4,),
        **affine('stem.norm', 4),
        **inside('stages.0.blocks.0', ss2d(4, 8, 2, gate=True)),
        **affine('stages.1.downsample.norm', 16),
        'stages.1.downsample.reduction.weight': (8, 16),
        **inside('stages.1.blocks.0', ss2d(8, 16, 2, gate=True)),
        **affine('norm', 8),
        'head.fc.weight': (3, 8),
        'head.fc.bias': (3,),
    }),
}  # fmt: skip
NOW = {
    'embed.cls_token': 'cls_token',
    'embed.pos_embed': 'pos_embed',
    'embed.proj.weight': 'patch_embed.proj.weight',
    'embed.proj.bias': 'patch_embed.proj.bias',
}


def earlier_state(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_loaded(model, state):
    own = model.state_dict()
    assert own.keys() == {NOW.get(name, name) for name in state}
    assert all(torch.equal(own[NOW.get(name, name)], value) for name, value in state.items())


@pytest.mark.parametrize('given', ['file', 'state_dict'])
@pytest.mark.parametrize('variant,options,shapes', EARLIER.values(), ids=EARLIER)
def test_every_weight_of_an_earlier_checkpoint_is_loaded(tmp_path, variant, options, shapes, given):
    state = earlier_state(shapes)
    torch.save({'state_dict': state, 'epoch': 3}, tmp_path / 'earlier.pt')
    overlay = dict(file=str(tmp_path / 'earlier.pt')) if given == 'file' else dict(state_dict=state)
    options = dict(options, **(dict(init_values=1.0) if variant == 'vim_nano' else {}))
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **options)
    assert_loaded(model, state)


def test_a_missing_weight_is_named_as_it_is_now(tmp_path):
    variant, options, shapes = EARLIER['vim']
    state = earlier_state(shapes)
    del state['embed.proj.bias']
    overlay = dict(state_dict=state)
    with pytest.raises(RuntimeError, match=r'missing: patch_embed\.proj\.bias'):
        timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **options)


def test_earlier_positions_are_resized(tmp_path):
    variant, options, shapes = EARLIER['vim']
    state = earlier_state(shapes)
    options = dict(options, img_size=24, num_classes=3, init_values=1.0)
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state), **options)
    assert model.pos_embed.shape == (1, 26, 16)
    assert torch.equal(model.pos_embed[:, 12], state['embed.pos_embed'][:, 4])
