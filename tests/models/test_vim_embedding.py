"""Vim's tokens: where the class token stands, and how the position embedding follows the image size."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from model_cases import tokens_of

from vmamba.models._isotropic import insert_class_token, resize_pos_embed, split_class_token
from vmamba.models.vim import Vim


def make_model(img_size=32, patch_size=16, stride=16, **options):
    """A Vim whose embedding alone matters."""
    return Vim(img_size, patch_size, stride, embed_dim=6, depth=1, num_classes=0, **options)


@pytest.mark.parametrize('patches', [1, 2, 9, 196, 729])
def test_the_class_token_stands_at_half_of_the_patches(patches):
    tokens = torch.arange(patches, dtype=torch.float32).view(1, -1, 1).expand(2, -1, 3)
    joined = insert_class_token(tokens, torch.full((2, 3), -1.0))
    expected = list(range(patches))
    expected.insert(patches // 2, -1)
    assert joined[1, :, 2].tolist() == expected
    split, class_token = split_class_token(joined)
    assert torch.equal(split, tokens)
    assert torch.equal(class_token, torch.full((2, 3), -1.0))


@torch.no_grad()
@pytest.mark.parametrize(
    'size,patch,stride,grid',
    [
        pytest.param((32, 48), 16, 16, (2, 3), id='tiles'),
        pytest.param((40, 32), 16, 8, (4, 3), id='overlapping'),
        pytest.param((9, 9), 3, 3, (3, 3), id='odd-number'),
        pytest.param((5, 5), 5, 5, (1, 1), id='one-patch'),
        pytest.param((32, 8), 8, 24, (2, 1), id='gaps'),
        pytest.param((8, 20), 4, 4, (2, 5), id='several'),
    ],
)
def test_tokens_are_patches_with_the_class_token_among_them_plus_positions(size, patch, stride, grid):
    model = make_model(size, patch, stride, in_chans=2)
    for parameter in (*model.patch_embed.parameters(), model.cls_token, model.pos_embed):
        torch.nn.init.normal_(parameter)
    proj = model.patch_embed.proj
    images = torch.randn(2, 2, *size)
    tokens = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            patch_pixels = images[:, :, row * stride : row * stride + patch, column * stride : column * stride + patch]
            tokens.append(torch.einsum('bchw,dchw->bd', patch_pixels, proj.weight) + proj.bias)
    tokens.insert(grid[0] * grid[1] // 2, model.cls_token[:, 0].expand(2, -1))
    expected = torch.stack(tokens, dim=1) + model.pos_embed
    assert model.patch_embed.grid_size == grid
    assert oracles.relative_error(tokens_of(model, images), expected) < 1e-5


@pytest.mark.parametrize('old,new', [((3, 3), (4, 6)), ((14, 14), (27, 27)), ((4, 6), (3, 2)), ((2, 3), (3, 2))])
def test_positions_are_resized_bicubically_around_the_class_token(old, new):
    pos_embed = torch.randn(1, old[0] * old[1] + 1, 5)
    middle = old[0] * old[1] // 2
    without = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)
    grid = without.reshape(1, *old, 5).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    resized = resize_pos_embed(pos_embed, old, new)
    half = new[0] * new[1] // 2
    assert resized.shape == (1, new[0] * new[1] + 1, 5)
    assert torch.equal(resized[:, half], pos_embed[:, middle])
    assert torch.equal(resized[:, :half], grid[:, :half])
    assert torch.equal(resized[:, half + 1 :], grid[:, half:])


def test_positions_of_the_same_grid_are_left_alone():
    pos_embed = torch.randn(1, 13, 5)
    assert torch.equal(resize_pos_embed(pos_embed, (3, 4), (3, 4)), pos_embed)


def test_positions_keep_their_dtype():
    assert resize_pos_embed(torch.randn(1, 10, 5).bfloat16(), (3, 3), (2, 2)).dtype == torch.bfloat16
    wide = torch.randn(1, 10, 5, dtype=torch.double)
    resized = resize_pos_embed(wide, (3, 3), (2, 4))
    grid = torch.cat([wide[:, :4], wide[:, 5:]], dim=1).reshape(1, 3, 3, 5)
    expected = oracles.resize_grid(grid, 2, 4).flatten(1, 2)
    assert resized.dtype == torch.double
    assert oracles.relative_error(torch.cat([resized[:, :4], resized[:, 5:]], dim=1), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize('size', [(32, 32), (48, 32), (80, 64)], ids='{0[0]}x{0[1]}'.format)
def test_dynamic_sizes_equal_setting_the_size(size):
    model = make_model(dynamic_img_size=True)
    images = torch.randn(1, 3, *size)
    dynamic = tokens_of(model, images)
    model.set_input_size(size)
    model.patch_embed.dynamic_img_size = False
    assert torch.equal(tokens_of(model, images), dynamic)
    assert model.patch_embed.grid_size == (size[0] // 16, size[1] // 16)
    assert model.pos_embed.requires_grad


def test_gradients_reach_the_positions_through_the_resizing():
    model = make_model(dynamic_img_size=True)
    tokens_of(model, torch.randn(1, 3, 48, 80)).square().sum().backward()
    assert (model.pos_embed.grad.abs().sum(dim=-1) > 0).all()
    assert (model.cls_token.grad.abs() > 0).all()


@pytest.mark.parametrize(
    'shape,value',
    [
        pytest.param((1, 3, 32, 48), '32x48', id='other-size'),
        pytest.param((1, 3, 64, 64), '64x64', id='larger'),
        pytest.param((1, 1, 32, 32), 'got 1', id='channels'),
        pytest.param((3, 32, 32), r'\(3, 32, 32\)', id='rank'),
    ],
)
def test_a_bad_image_is_an_error_that_shows_it(shape, value):
    with pytest.raises(ValueError, match=value):
        make_model()(torch.zeros(shape))


@pytest.mark.parametrize('size', [(33, 32), (32, 40), (8, 32), (15, 15)], ids='{0[0]}x{0[1]}'.format)
def test_a_size_that_patches_do_not_cover_is_an_error_that_shows_it(size):
    model = make_model(dynamic_img_size=True)
    shown = f'{size[0]}x{size[1]}'
    with pytest.raises(ValueError, match=shown):
        model(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=shown):
        model.set_input_size(size)
    with pytest.raises(ValueError, match=shown):
        make_model(size)
    assert model.patch_embed.grid_size == (2, 2) and model.pos_embed.shape == (1, 5, 6)


def test_setting_the_size_keeps_frozen_positions_frozen():
    model = make_model()
    model.pos_embed.requires_grad_(False)
    model.set_input_size(48)
    assert not model.pos_embed.requires_grad
