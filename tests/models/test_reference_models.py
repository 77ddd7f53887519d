"""Whole models, from official checkpoints, against what the official definitions compute in float64."""

import argparse

import official
import oracles
import pytest
import timm
import torch

import vmamba  # noqa: F401, registers the models

VMAMBA_CASES = [
    # variant, depths, embed_dim, ssm_ratio, v0, image (H, W)
    pytest.param('vmamba_t', (1, 1, 1, 1), 8, 1.0, False, (32, 32), id='current-s1'),
    pytest.param('vmamba_s', (1, 2, 1, 1), 8, 2.0, False, (32, 48), id='current-s2-wide'),
    pytest.param('vmamba_b_s1l20', (2, 1), 24, 1.0, False, (37, 22), id='current-odd-image'),
    pytest.param('vmamba_t_v0', (1, 1, 1, 1), 8, 2.0, True, (32, 32), id='v0'),
    pytest.param('vmamba_b_v0', (1, 2), 24, 2.0, True, (28, 20), id='v0-odd-maps'),
]
VIM_CASES = [
    # variant, depth, dim, stride, image (H, W), gamma
    pytest.param('vim_t', 2, 24, 16, (48, 48), False, id='odd-patches'),
    pytest.param('vim_s', 3, 16, 16, (64, 64), False, id='even-patches'),
    pytest.param('vim_t_stride8', 2, 24, 8, (32, 32), False, id='overlapping'),
    pytest.param('vim_b', 2, 40, 16, (32, 64), True, id='wide-gamma'),
]


def load(variant, path, **kwargs):
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def small_vmamba(variant, tmp_path, depths, embed_dim, ssm_ratio, v0, **kwargs):
    state = official.vmamba_state(depths, embed_dim, ssm_ratio, v0)
    torch.save({'model': state}, tmp_path / 'vssm.pth')
    return state, load(variant, tmp_path / 'vssm.pth', depths=depths, embed_dim=embed_dim, **kwargs)


def small_vim(variant, tmp_path, depth, dim, stride, size, gamma, **kwargs):
    grid = [(side - 16) // stride + 1 for side in size]
    state = official.vim_state(depth, dim, grid[0] * grid[1], gamma=gamma)
    checkpoint = {'model': state, 'model_ema': state, 'optimizer': {'state': {}}, 'args': argparse.Namespace(lr=1e-3)}
    torch.save(checkpoint, tmp_path / 'vim.pth')
    return state, load(variant, tmp_path / 'vim.pth', depth=depth, embed_dim=dim, img_size=size, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize('variant,depths,embed_dim,ssm_ratio,v0,size', VMAMBA_CASES)
def test_vmamba_logits(tmp_path, variant, depths, embed_dim, ssm_ratio, v0, size):
    state, model = small_vmamba(variant, tmp_path, depths, embed_dim, ssm_ratio, v0)
    images = torch.randn(2, 3, *size)
    expected = official.vmamba_logits(state, images)
    assert oracles.relative_error(model(images), expected) < 1e-4
    assert oracles.relative_error(model.double()(images.double()), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize('variant,depths,embed_dim,ssm_ratio,v0,size', VMAMBA_CASES)
def test_vmamba_features_are_taken_before_the_downsampling(tmp_path, variant, depths, embed_dim, ssm_ratio, v0, size):
    indices = tuple(range(len(depths)))
    state, model = small_vmamba(
        variant, tmp_path, depths, embed_dim, ssm_ratio, v0, features_only=True, out_indices=indices
    )
    images = torch.randn(2, 3, *size)
    expected = official.vmamba_maps(state, images)
    features = model(images)
    assert len(features) == len(expected)
    for feature, stage in zip(features, expected):
        assert oracles.relative_error(feature.permute(0, 2, 3, 1), stage) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('variant,depth,dim,stride,size,gamma', VIM_CASES)
def test_vim_logits(tmp_path, variant, depth, dim, stride, size, gamma):
    state, model = small_vim(variant, tmp_path, depth, dim, stride, size, gamma)
    images = torch.randn(2, 3, *size)
    expected = official.vim_logits(state, images, stride)
    assert oracles.relative_error(model(images), expected) < 1e-4
    assert oracles.relative_error(model.double()(images.double()), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize('variant,depth,dim,stride,size,gamma', VIM_CASES)
def test_vim_features_are_the_patches_of_every_block(tmp_path, variant, depth, dim, stride, size, gamma):
    indices = tuple(range(depth))
    state, model = small_vim(
        variant, tmp_path, depth, dim, stride, size, gamma, features_only=True, out_indices=indices
    )
    images = torch.randn(2, 3, *size)
    features = model(images)
    grid = [(side - 16) // stride + 1 for side in size]
    middle = grid[0] * grid[1] // 2
    for feature, tokens in zip(features, official.vim_tokens(state, images, stride)):
        patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
        assert tuple(feature.shape[-2:]) == tuple(grid)
        assert oracles.relative_error(feature.flatten(2).transpose(1, 2), patches) < 1e-4


@pytest.mark.parametrize('v0', [pytest.param(False, id='current'), pytest.param(True, id='v0')])
def test_vmamba_gradient_with_respect_to_the_image(tmp_path, v0):
    state, model = small_vmamba('vmamba_t_v0' if v0 else 'vmamba_s', tmp_path, (1, 1), 8, 2.0, v0, num_classes=1000)
    images = torch.randn(1, 3, 20, 28, dtype=torch.double)
    grads = []
    for forward in (model.double(), lambda x: official.vmamba_logits(state, x)):
        x = images.clone().requires_grad_()
        forward(x).square().sum().backward()
        grads.append(x.grad)
    assert oracles.relative_error(*grads) < 1e-6


def test_vim_gradient_with_respect_to_the_image(tmp_path):
    state, model = small_vim('vim_t', tmp_path, 2, 16, 16, (48, 32), gamma=False)
    images = torch.randn(1, 3, 48, 32, dtype=torch.double)
    grads = []
    for forward in (model.double(), lambda x: official.vim_logits(state, x)):
        x = images.clone().requires_grad_()
        forward(x).square().sum().backward()
        grads.append(x.grad)
    assert oracles.relative_error(*grads) < 1e-6
