"""Images of any size, layout and dtype, and those that are no images."""

import numpy
import oracles
import pytest
import timm
import torch
from model_cases import BATCH_NORMS, CLASS_TOKENS, SMALL, STAGES, images, small


@torch.no_grad()
@pytest.mark.parametrize('family,size', [
    *(('vmamba', size) for size in ((1, 1), (1, 9), (37, 50), (33, 64), (224, 32), (40, 40))),
    *(('v0', size) for size in ((4, 4), (4, 21), (37, 50), (36, 64), (224, 32))),
    *((family, size) for family in STAGES[2:] for size in ((1, 9), (37, 50), (96, 40))),
])  # fmt: skip
def test_models_of_stages_take_any_size(family, size):
    model = small(family).eval()
    features = model.forward_features(images(2, 3, *size))
    side = (lambda s: -(-(s // 4) // 8)) if family == 'v0' else (lambda s: -(-s // 32))
    assert tuple(features.shape) == (2, 64, side(size[0]), side(size[1]))
    assert features.isfinite().all()
    assert model(images(2, 3, *size)).isfinite().all()


@torch.no_grad()
def test_vmamba_sees_every_pixel_of_an_odd_image():
    model, x = small('vmamba').eval(), images(1, 3, 37, 50)
    y = model(x)
    for row, column in ((0, 0), (36, 49), (36, 0), (0, 49)):
        changed = x.clone()
        changed[..., row, column] += 3
        assert oracles.relative_error(model(changed), y) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize('family', CLASS_TOKENS)
@pytest.mark.parametrize('size', [(32, 32), (20, 64), (4, 4)], ids=str)
def test_dynamic_set_and_static_sizes_agree(family, size):
    """One position embedding: made for 32x32, resized at each call, once, or while loading."""
    dynamic, x = small(family, dynamic_img_size=True).eval(), images(2, 3, *size)
    logits = dynamic(x)
    assert dynamic(images(1, 3, 32, 32)).shape == (1, 10), 'the size of one call leaves nothing behind'
    resized = small(family).eval()
    resized.load_state_dict(dynamic.state_dict())
    resized.set_input_size(size)
    assert torch.equal(resized(x), logits)
    static = small(family, img_size=size).eval()
    static.load_state_dict(resized.state_dict())
    assert torch.equal(static(x), logits)
    assert static.patch_embed.grid_size == (size[0] // 4, size[1] // 4)


@torch.no_grad()
def test_vim_features_follow_a_dynamic_size():
    model = small('vim', dynamic_img_size=True).eval()
    assert model.forward_intermediates(images(1, 3, 20, 44), intermediates_only=True)[0].shape == (1, 16, 5, 11)
    getter = small('vim', dynamic_img_size=True, features_only=True, out_indices=(1,)).eval()
    assert getter(images(1, 3, 44, 20))[0].shape == (1, 16, 11, 5)


@torch.no_grad()
def test_vim_with_overlapping_patches_follows_a_dynamic_size():
    options = dict(depth=1, embed_dim=16, patch_size=8, stride=4, num_classes=3)
    model = timm.create_model('vim_nano', img_size=32, dynamic_img_size=True, **options).eval()
    assert model.patch_embed.grid_size == (7, 7)
    x = images(1, 3, 48, 28)
    y = model(x)
    model.set_input_size((48, 28))
    assert torch.equal(model(x), y)
    assert model.pos_embed.shape == (1, 11 * 6 + 1, 16)


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_batches_of_any_size(family, batch):
    model = small(family).eval()
    x = images(3, 3, 32, 32)
    y = model(x[:batch])
    assert y.shape == (batch, 10)
    assert oracles.relative_error(y, model(x)[:batch]) < 1e-5


@pytest.mark.parametrize('family', SMALL)
def test_an_empty_batch_trains(family):
    model = small(family).train()
    model(images(0, 3, 32, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_memory_layout_does_not_matter(family):
    model, x = small(family).eval(), images(2, 3, 32, 48 if family in STAGES else 32)
    y = model(x)
    layouts = {
        'channels_last': x.contiguous(memory_format=torch.channels_last),
        'transposed': x.transpose(2, 3).contiguous().transpose(2, 3),
        'sliced': torch.stack([x, x.neg()], dim=-1)[..., 0],
        'flipped': x.flip(0).flip(0),
    }
    for name, laid_out in layouts.items():
        assert oracles.relative_error(model(laid_out), y) < 1e-5, name
    expanded = x[:1].expand(2, -1, -1, -1)
    assert oracles.relative_error(model(expanded)[1:], y[:1]) < 1e-5
    last = model.to(memory_format=torch.channels_last)
    assert oracles.relative_error(last(x), y) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_images_of_a_batch_do_not_mix(family):
    model, x = small(family).eval(), images(3, 3, 32, 32)
    changed = x.clone()
    changed[1] = torch.randn(3, 32, 32)
    assert oracles.relative_error(model(changed)[[0, 2]], model(x)[[0, 2]]) < 1e-6


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize(
    'image,value',
    [
        pytest.param(torch.zeros(3, 32, 32), r'\(3, 32, 32\)', id='rank'),
        pytest.param(torch.zeros(1, 4, 32, 32), 'got 4', id='channels'),
        pytest.param(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'uint8', id='integers'),
        pytest.param(torch.zeros(1, 32, 32, 3), 'got 32', id='channels-last-order'),
        pytest.param(torch.zeros(1, 3, 0, 32), '0x32', id='no-rows'),
        pytest.param(torch.zeros(1, 3, 32, 0), '32x0', id='no-columns'),
    ],
)
def test_what_is_no_image_is_an_error_that_shows_it(family, image, value):
    model = small(family)
    with pytest.raises(ValueError, match=value):
        model(image)
    with pytest.raises(ValueError, match=value):
        model.forward_intermediates(image)
    with pytest.raises(ValueError, match=value):
        small(family, features_only=True)(image)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize(
    'image', [numpy.zeros((1, 3, 32, 32), numpy.float32), [[[[0.0]]]], None], ids=lambda image: type(image).__name__
)
def test_what_is_no_tensor_is_an_error_that_names_its_type(family, image):
    model = small(family)
    calls = [model, model.forward_features, model.forward_intermediates, small(family, features_only=True)]
    calls.append(torch.compile(model, backend='eager'))
    for call in calls:
        with pytest.raises(TypeError, match=rf'expected a tensor of images \[B, 3, H, W\], got {type(image).__name__}'):
            call(image)


@pytest.mark.parametrize(
    'family,size', [('v0', (3, 32)), ('v0', (32, 2)), ('vim', (36, 32)), ('vim', (33, 32)), ('adventurer', (16, 16))]
)
def test_a_size_that_the_model_cannot_take_is_an_error_that_shows_it(family, size):
    with pytest.raises(ValueError, match=f'{size[0]}x{size[1]}'):
        small(family)(images(1, 3, *size))


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_modules_in_double_and_in_bfloat16(family):
    model, x = small(family).eval(), images()
    expected = model(x)
    double = model.double()(x.double())
    assert double.dtype == torch.float64
    assert oracles.relative_error(expected, double) < 1e-4
    brief = model.bfloat16()(x.bfloat16())
    assert brief.dtype == torch.bfloat16
    assert oracles.relative_error(brief, double) < 0.05


@pytest.mark.parametrize('family', SMALL)
def test_autocast_is_close_to_full_precision(family):
    # Statistics of small maps amplify rounding.
    model, x = small(family).train(family not in BATCH_NORMS), images()
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            y = model(x)
        (y.float() ** 2).sum().backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        brief = model(x)
    assert oracles.relative_error(brief, model(x)) < 0.05
    assert oracles.relative_error(grads[1], grads[0]) < 0.1


@pytest.mark.parametrize('family', CLASS_TOKENS)
def test_the_stream_of_tokens_is_fp32_under_autocast_and_in_bfloat16(family):
    seen = []
    for model, x in ((small(family), images()), (small(family).bfloat16(), images().bfloat16())):
        hook = model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        with torch.autocast('cpu', torch.bfloat16, enabled=x.dtype == torch.float32):
            model(x)
        hook.remove()
    assert seen == [torch.float32] * 2


@torch.no_grad()
@pytest.mark.parametrize('family,name,taken,returned', [
    ('vmamba', 'stem.act', torch.bfloat16, torch.bfloat16),
    ('vmamba', 'stem', torch.float32, torch.float32),
    ('vmamba', 'stages.1.downsample', torch.float32, torch.float32),
    ('vmamba', 'stages.1.blocks.0.mixer', torch.bfloat16, torch.bfloat16),
    ('vmamba', 'stages.1.blocks.0.mlp', torch.bfloat16, torch.bfloat16),
    ('vmamba', 'stages.1', torch.float32, torch.float32),
    ('vmamba', 'norm', torch.float32, torch.float32),
    ('v0', 'stem', torch.float32, torch.float32),
    ('v0', 'stages.1.downsample.reduction', torch.bfloat16, torch.bfloat16),
    ('v0', 'stages.1', torch.float32, torch.bfloat16),
    ('v0', 'norm', torch.bfloat16, torch.float32),
])  # fmt: skip
def test_vmambas_maps_under_autocast(family, name, taken, returned):
    """Each is in the dtype that its reader takes; what starts and ends a stage is not rounded, but by a projection."""
    model, seen = small(family).eval(), []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    with torch.autocast('cpu', torch.bfloat16):
        model(images())
    assert seen == [taken, returned]


@pytest.mark.parametrize('family', SMALL)
def test_gradients_reach_the_image(family):
    x = images().requires_grad_()
    small(family)(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs() > 0).float().mean() > 0.99


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_inference_mode_equals_no_grad(family):
    model, x = small(family).eval(), images()
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
