"""Adventurer: variants, official checkpoints, and the models against the definition in float64."""

import argparse

import official_adventurer as official
import oracles
import pytest
import timm
import torch

from vmamba.models._isotropic import resize_pos_embed
from vmamba.models.adventurer import Adventurer

VARIANTS = [
    # name, tag, official name, parameters, tensors, size, crop, file
    ('adventurer_t', 'in1k', 'tiny_patch16', 11_608_840, 199, 224, 0.875, 'adventurer_tiny_patch16_224.pth'),
    ('adventurer_s', 'in1k', 'small_patch16', 44_491_816, 199, 224, 0.875, 'adventurer_small_patch16_224.pth'),
    ('adventurer_b', 'in1k', 'base_patch16', 98_657_608, 199, 224, 0.875, 'adventurer_base_patch16_224.pth'),
    ('adventurer_b', 'in1k_384', '', 98_949_448, 199, 384, 1.0, 'adventurer_base_patch16_384.pth'),
    ('adventurer_b', 'in1k_448', '', 99_109_192, 199, 448, 1.0, 'adventurer_base_patch16_448.pth'),
    ('adventurer_l', 'in1k', 'large_patch16', 346_196_200, 391, 224, 0.875, 'adventurer_large_patch16_224.pth'),
    ('adventurer_b_patch8', 'in1k', 'base_patch8', 98_666_824, 199, 224, 1.0, 'adventurer_base_patch8_224.pth'),
    ('adventurer_b_patch8', 'in1k_448', '', 100_473_160, 199, 448, 1.0, 'adventurer_base_patch8_448.pth'),
]
SHAPE = dict(depth=4, embed_dim=16, d_state=6, headdim=8)


def load(path, variant='adventurer_t', **kwargs):
    overlay = dict(file=str(path))
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **{**SHAPE, **kwargs}).eval()


def save(path, state):
    torch.save({'model': state, 'epoch': 3, 'args': argparse.Namespace(lr=1e-3)}, path)
    return path


@pytest.mark.parametrize(
    'name,tag,official_name,count,tensors,size,crop,file', VARIANTS, ids=[f'{v[0]}.{v[1]}' for v in VARIANTS]
)
def test_variants(name, tag, official_name, count, tensors, size, crop, file):
    model = timm.create_model(f'{name}.{tag}', device='meta')
    cfg = model.pretrained_cfg
    assert isinstance(model, Adventurer) and model.patch_embed.img_size == (size, size)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.state_dict()) == tensors
    assert (cfg['hf_hub_id'], cfg['hf_hub_filename'], cfg['license']) == ('Wangf3014/Adventurer', file, 'none')
    assert (cfg['input_size'], cfg['crop_pct']) == ((3, size, size), crop)
    assert [i for i, block in enumerate(model.blocks) if block.flip] == [2, 3]
    if official_name:
        with pytest.warns(UserWarning, match=name):
            assert timm.create_model(f'adventurer_{official_name}', depth=1, device='meta').pretrained_cfg == cfg


@torch.no_grad()
@pytest.mark.parametrize('variant,patch', [('adventurer_t', 16), ('adventurer_b_patch8', 8)])
def test_official_files_give_the_official_logits(tmp_path, variant, patch):
    state = official.adventurer_state(patches=6, patch_size=patch)
    state['pos_embed'] = state['pos_embed'][:, :7]
    size = 2 * patch, 3 * patch
    overlay = dict(file=str(save(tmp_path / 'adventurer.pth', state)), input_size=(3, *size))
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **SHAPE).eval()
    images = torch.randn(2, 3, *size)
    expected = official.adventurer_logits(state, images)
    assert oracles.relative_error(model(images), expected) < 1e-4
    assert oracles.relative_error(model.double()(images.double()), expected) < 1e-6


def test_tokens_and_gradients_follow_the_definition(tmp_path):
    state = official.adventurer_state()
    path = save(tmp_path / 'adventurer.pth', state)
    model = load(path, img_size=32, flipped_blocks=(1, 2)).double()
    images, results = torch.randn(2, 3, 32, 32, dtype=torch.double), []
    for forward in (
        lambda x: model.forward_intermediates(x, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True),
        lambda x: [(t[:, :-1], t[:, -1:]) for t in official.adventurer_tokens(state, x, flipped=(1, 2))],
    ):
        x = images.clone().requires_grad_()
        out = [torch.cat(pair, dim=1) for pair in forward(x)]
        sum(y.square().mean() for y in out).backward()
        results.append([*out, x.grad])
    for actual, expected in zip(*results, strict=True):
        assert oracles.relative_error(actual, expected) < 1e-8


@torch.no_grad()
def test_another_image_size_resizes_all_positions_but_the_last(tmp_path):
    state = official.adventurer_state(patches=9)
    model = load(save(tmp_path / 'adventurer.pth', state), img_size=(64, 80))
    expected = resize_pos_embed(state['pos_embed'], (3, 3), (4, 5), at='last')
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(expected[:, -1], state['pos_embed'][:, -1])
    grid = state['pos_embed'][:, :-1].double().unflatten(1, (3, 3))
    assert oracles.relative_error(expected[:, :-1], oracles.resize_grid(grid, 4, 5).flatten(1, 2)) < 1e-6
    images = torch.randn(1, 3, 64, 80)
    resized = official.adventurer_logits({**state, 'pos_embed': model.pos_embed.detach()}, images)
    assert oracles.relative_error(model(images), resized) < 1e-4
    dynamic = load(tmp_path / 'adventurer.pth', img_size=48, dynamic_img_size=True)
    assert oracles.relative_error(dynamic(images), resized) < 1e-4


@torch.no_grad()
def test_pooling_the_patches_leaves_the_class_token_out():
    model = timm.create_model('adventurer_nano', global_pool='avg', depth=2, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert oracles.relative_error(model(images), model.head(tokens[:, :-1].mean(dim=1))) < 1e-6


@pytest.mark.parametrize('blocks', [3, (1.5,), '23'], ids=str)
def test_flipped_blocks_that_are_no_indices_are_an_error(blocks):
    with pytest.raises(ValueError, match='flipped_blocks must be .*, got'):
        timm.create_model('adventurer_nano', device='meta', flipped_blocks=blocks)
