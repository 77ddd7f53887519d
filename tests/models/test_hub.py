"""timm's functions for the Hugging Face Hub, on models of every family."""

import fake_hub
import pytest
import timm
import torch
from model_cases import CLASS_TOKENS, SMALL, images, small
from PIL import Image

pytest.importorskip('timm.models._input')  # earlier versions do not save the arguments of models
PREPROCESSING = dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_pct=0.75, interpolation='bilinear')
LABELS = ['ant', 'bee', 'cat', 'dog', 'eel']


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return fake_hub.use(monkeypatch, tmp_path / 'hub', 'timm.models._hub.HfApi')


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_an_uploaded_model_gives_the_same_logits(family, hub):
    model = small(family, num_classes=5).eval()
    model.pretrained_cfg.update(**PREPROCESSING)
    timm.models.push_to_hf_hub(model, 'me/model', model_config=dict(label_names=LABELS))
    cfg, name, arguments = timm.models.load_model_config_from_hf('me/model')
    assert (name, cfg['num_classes'], cfg['label_names']) == (SMALL[family][0], 5, LABELS)
    assert arguments['embed_dim'] == SMALL[family][1]['embed_dim'] and cfg['license'] == model.pretrained_cfg['license']
    loaded = timm.create_model('hf-hub:me/model', pretrained=True).eval()
    x = images()
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.pretrained_cfg['label_names'] == LABELS
    size = 32 if family in CLASS_TOKENS else model.pretrained_cfg['input_size'][-1]
    expected = timm.data.create_transform(input_size=(3, size, size), **PREPROCESSING)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    photo = Image.fromarray(torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8).numpy())
    assert torch.equal(transform(photo), expected(photo))


@torch.no_grad()
def test_another_number_of_classes_keeps_the_backbone_of_an_uploaded_model(hub):
    model = small('vmamba').eval()
    timm.models.push_to_hf_hub(model, 'me/model')
    loaded = timm.create_model('hf-hub:me/model', pretrained=True, num_classes=3).eval()
    x = images()
    torch.testing.assert_close(loaded.forward_features(x), model.forward_features(x))
    assert loaded(x).shape == (2, 3)


def test_weights_that_do_not_fit_their_configuration_are_an_error(hub):
    timm.models.push_to_hf_hub(small('vim'), 'me/model', safe_serialization=True)
    path = hub.folder_of('me/model') / 'config.json'
    path.write_text(path.read_text().replace('"embed_dim": 16', '"embed_dim": 24'))
    with pytest.raises(RuntimeError, match=r'vim_nano.*does not fit.*of another shape'):
        timm.create_model('hf-hub:me/model', pretrained=True)
