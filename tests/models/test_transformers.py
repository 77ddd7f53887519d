"""transformers' wrappers of timm models, which know the models of this library once it is imported."""

import pytest
import timm
import torch
from model_cases import CHANNELS, SMALL, images, small
from PIL import Image

transformers = pytest.importorskip('transformers')
assert_close = torch.testing.assert_close


def config_of(family, **kwargs):
    """transformers' configuration of a small model with three classes."""
    name, arguments = SMALL[family]
    cfg = dict(timm.get_pretrained_cfg(name).to_dict(), input_size=(3, 32, 32))
    arguments = {key: value for key, value in arguments.items() if key != 'num_classes'}
    return transformers.TimmWrapperConfig(
        architecture=name, model_args=arguments, num_labels=3, pretrained_cfg=cfg, **kwargs
    )


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_a_classifier_is_saved_and_loaded(family, tmp_path):
    config = config_of(family, id2label={0: 'cat', 1: 'dog', 2: 'eel'})
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = images()
    inner = model.timm_model
    expected = inner(x)
    assert expected.shape == (2, 3)
    assert_close(loaded(x).logits, expected)
    assert loaded.config.id2label == {0: 'cat', 1: 'dog', 2: 'eel'}
    output = loaded(x, output_hidden_states=True)
    assert_close(output.logits, expected)
    final, maps = inner.forward_intermediates(x)
    assert len(maps) == 4
    assert_close(list(output.hidden_states), maps)

    features = transformers.AutoModel.from_pretrained(tmp_path).eval()(x, output_hidden_states=True)
    assert_close(features.last_hidden_state, final)
    assert_close(features.pooler_output, inner.forward_head(final, pre_logits=True))
    assert_close(list(features.hidden_states), maps)

    ours = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert_close(ours(x), expected)


def test_gradients_of_a_loss_reach_every_parameter():
    model = transformers.TimmWrapperForImageClassification(config_of('vmamba'))
    model(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['vmamba_t', 'vim_nano', 'mambavision_t2', 'mambavision_l3.in21k_ft_in1k_512'])
def test_preprocessing_is_timms(name, tmp_path):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    config = transformers.TimmWrapperConfig(architecture=name, pretrained_cfg=cfg, num_labels=1000)
    config.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    photos = [
        Image.fromarray(torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()) for size in ((300, 400), (50, 20))
    ]
    assert_close(processor(photos)['pixel_values'], torch.stack([transform(photo) for photo in photos]))


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_feature_maps_of_a_backbone(family, tmp_path):
    name, arguments = SMALL[family]
    arguments = {key: value for key, value in arguments.items() if key != 'num_classes'}
    indices = [1, 3]
    transformers.TimmBackboneConfig(backbone=name, out_indices=indices).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, transformers.TimmBackboneConfig)
    backbone = transformers.TimmBackbone(config, **arguments).eval()
    reference = small(family, features_only=True, out_indices=indices).eval()
    reference.load_state_dict(backbone._backbone.state_dict())
    x = images()
    maps = backbone(x).feature_maps
    assert_close(list(maps), reference(x))
    assert backbone.channels == [CHANNELS[family][i] for i in indices] == [m.shape[1] for m in maps]


@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_nano', 'mambavision_nano', 'vssd_nano', 'adventurer_nano'])
def test_upernet_on_a_backbone(name, tmp_path):
    backbone = transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    sizes = dict(hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=None, num_labels=5)
    config = transformers.UperNetConfig(backbone_config=backbone, **sizes)
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    size = (32, 32) if name in ('vim_nano', 'adventurer_nano') else (64, 96)
    x, labels = images(2, 3, *size), torch.randint(0, 5, (2, *size))
    output = model(x, labels=labels)
    assert output.logits.shape == (2, 5, *size) and output.logits.isfinite().all()
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert next(iter(gradients)).startswith('backbone.') and next(iter(gradients.values())).any()
    model.save_pretrained(tmp_path)
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert_close(loaded(x).logits, output.logits)
