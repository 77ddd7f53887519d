"""What timm expects of a model and of its pretrained configuration, of every registered one, on the meta device."""

import pytest
import timm
import torch
from model_cases import SMALL, STAGES, VARIANTS, images, small, tokens_of
from timm.models import is_model_pretrained
from torch import nn


def on_meta(name, **kwargs):
    """The model without its depth, which nothing here depends on, and images of its configuration."""
    shallow = dict(depth=2) if name.startswith(('vim', 'adventurer')) else dict(depths=(1, 1, 1, 1))
    model = timm.create_model(name, device='meta', **{**shallow, **kwargs}).eval()
    return model, torch.empty(2, *model.pretrained_cfg['input_size'], device='meta')


def widths(model, x):
    features = model.forward_features(x)
    return features.shape, model.forward_head(features, pre_logits=True).shape


@pytest.mark.parametrize('name', VARIANTS)
def test_the_configuration_describes_the_model(name):
    model, x = on_meta(name)
    cfg, names = model.pretrained_cfg, dict(model.named_parameters())
    features, pooled = widths(model, x)
    assert cfg['pool_size'] == (tuple(features[2:]) if len(features) == 4 else None)
    assert (model.in_chans, model.num_classes) == (cfg['input_size'][0], cfg['num_classes'])
    assert f'{cfg["first_conv"]}.weight' in names and f'{cfg["classifier"]}.weight' in names
    assert features[1 if len(features) == 4 else 2] == model.num_features
    assert pooled == (2, model.head_hidden_size)
    assert model(x).shape == (2, cfg['num_classes'])
    assert model.no_weight_decay() <= names.keys()
    assert is_model_pretrained(name) == (cfg['tag'] != 'untrained')
    assert cfg['license'] and cfg['paper_ids'] and cfg['origin_url']


@pytest.mark.parametrize('name', VARIANTS)
def test_without_a_classifier_the_pooled_features_are_the_output(name):
    model, x = on_meta(name)
    pooled = widths(model, x)[1]
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == pooled == on_meta(name, num_classes=0)[0](x).shape
    assert not any(key.startswith(model.pretrained_cfg['classifier']) for key, _ in model.named_parameters())
    model.reset_classifier(0, '')
    assert model(x).shape == widths(model, x)[0]


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_what_replaces_a_module_is_like_the_model(name, training):
    model = on_meta(name)[0].to(torch.float64).train(training)
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert {p.dtype for p in model.get_classifier().parameters()} == {torch.float64}
    assert {module.training for module in model.modules()} == {training}
    model.requires_grad_(False)
    model.prune_intermediate_layers([0], prune_norm=True)
    assert {module.training for module in model.modules()} == {training}
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_a_new_classifier_of_a_model_in_evaluation_does_not_drop_out(family):
    model, x = small(family, drop_rate=0.5).eval(), images()
    model.reset_classifier(5)
    assert torch.equal(model(x), model(x))
    model.prune_intermediate_layers([1])
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize('family,pool', [*((family, 'foo' if family in STAGES else 'max') for family in SMALL)])
def test_a_classifier_that_cannot_be_leaves_the_model_as_it_was(family, pool):
    model = small(family, device='meta')
    for arguments, shown in (((3, pool), pool), ((-1,), '-1')):
        with pytest.raises((ValueError, AssertionError), match=shown):
            model.reset_classifier(*arguments)
        assert model.num_classes == model.get_classifier().out_features == 10


@pytest.mark.parametrize('family', STAGES)
def test_the_width_of_joined_poolings(family):
    x = images().to('meta')
    joined = small(family, global_pool='catavgmax', num_classes=0, device='meta')
    assert joined(x).shape == (2, joined.head_hidden_size) == (2, 2 * joined.num_features)
    joined.reset_classifier(7, 'avg')
    assert joined.head_hidden_size == joined.num_features
    joined.reset_classifier(7, 'catavgmax')
    assert joined.head_hidden_size == joined.get_classifier().in_features == 2 * joined.num_features
    joined.prune_intermediate_layers([1])
    joined.reset_classifier(7, 'avg')
    assert joined.head_hidden_size == joined.num_features == joined.get_classifier().in_features


@pytest.mark.parametrize('family,options', [*((family, {}) for family in SMALL), ('vim', dict(init_values=0.5))])
def test_a_model_from_the_meta_device_is_initialised_whole(family, options):
    model = small(family, device='meta', **options).to_empty(device='cpu')
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float('nan') if tensor.is_floating_point() else 7)
    model.init_weights()
    made = small(family, **options)
    for (key, ours), theirs in zip(model.named_parameters(), made.parameters(), strict=True):
        assert ours.isfinite().all(), key
        if ours.numel() >= 256 or theirs.std() == 0:
            torch.testing.assert_close(ours.abs().mean(), theirs.abs().mean(), rtol=0.3, atol=1e-6, msg=key)


def test_vims_class_token_is_no_prefix():
    """A reader that cuts the first tokens off would take the class token for a patch."""
    model = small('vim')
    assert model.num_prefix_tokens == 0
    nn.init.constant_(model.cls_token, 100.0)
    assert tokens_of(model, images())[0].mean(dim=1).argmax() == 32


def test_setting_the_image_size_is_known_to_timm(tmp_path):
    traits = pytest.importorskip('timm.models._input')
    model = small('vim').eval()
    model.set_input_size()
    assert model.patch_embed.img_size == (32, 32)
    model.set_input_size((32, 48))
    assert traits.get_model_input_config(model)['input_size'] == (3, 32, 48)
    timm.models.save_for_hf(model, tmp_path)
    loaded, x = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), images(1, 3, 32, 48)
    assert torch.equal(loaded(x), model(x))
