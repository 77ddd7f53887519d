"""`vmamba push`: what it writes loads with timm, transformers and the other commands, and says what it is."""

import json
import re
import sys
from pathlib import Path

import fake_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

import vmamba_cli
from vmamba.tools import push
from vmamba.tools.model_card import PAPERS, license_of, make_card
from vmamba.tools.training.config import Config
from vmamba.tools.training.setup import data_config_of, describe

ROOT = Path(__file__).parents[2]
TOKENS = dict(depth=1, embed_dim=16, img_size=32)
STAGES = dict(depths=[1, 1, 1, 1], embed_dim=8)
MODELS = {
    'vmamba_nano': STAGES,
    'vmamba_nano_moe': STAGES,
    'vmamba_t_m2': STAGES,
    'mambavision_nano': dict(depths=[1, 1, 1, 1], embed_dim=16, window_size=2),
    'vssd_nano': dict(STAGES, num_heads=[2, 2, 4, 4]),
    'vim_nano': TOKENS,
    'vim2_t': dict(TOKENS, headdim=8),
    'adventurer_nano': dict(TOKENS, headdim=8),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(push, 'get_token', lambda: 'token')
    return fake_hub.use(monkeypatch, tmp_path / 'hub', 'vmamba.tools.push.HfApi')


def run(*arguments):
    push.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 or error.startswith('usage: ')
    return error.splitlines()[-1]


def checkpoint(path, name='vim_nano', classes=('cat', 'dog', 'eel'), in_chans=3, **settings):
    """A best.pt as `vmamba train` writes it, and its model."""
    config = Config(model=name, model_args=MODELS[name], in_chans=in_chans, crop_pct=0.8, epochs=7, **settings)
    model = timm.create_model(name, num_classes=len(classes), in_chans=in_chans, **MODELS[name]).eval()
    indices = {label: index for index, label in enumerate(classes)}
    facts = describe(config, data_config_of(config, model), len(classes), indices)
    figures = dict(epoch=5, val_top1=12.5, val_top5=50.0, ema_top1=62.5, ema_top5=87.25)
    torch.save(
        {'state_dict': model.state_dict(), 'averaged': True, 'config': facts, 'recipe': vars(config), **figures}, path
    )
    return model


def photo():
    return Image.fromarray(torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8).numpy())


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_a_checkpoint_becomes_a_folder_that_timm_and_transformers_load(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    size = MODELS[name].get('img_size', 64)
    model = checkpoint(tmp_path / 'best.pt', name, img_size=size)
    run('me/pets', '--checkpoint', tmp_path / 'best.pt', '--folder', tmp_path / 'pets')
    assert {path.name for path in (tmp_path / 'pets').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    loaded = timm.create_model(f'local-dir:{tmp_path}/pets', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    image = photo()
    x = transform(image)[None]
    assert x.shape == (1, 3, size, size)
    logits = model(x)
    torch.testing.assert_close(loaded(x), logits)
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog', 'eel'] and loaded.pretrained_cfg['crop_pct'] == 0.8

    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'pets').eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'pets')
    assert torch.equal(processor(image)['pixel_values'], x)
    torch.testing.assert_close(wrapped(x).logits, logits)
    assert wrapped.config.id2label == {0: 'cat', 1: 'dog', 2: 'eel'}
    features = transformers.AutoModel.from_pretrained(tmp_path / 'pets').eval()(x)
    torch.testing.assert_close(features.last_hidden_state, model.forward_features(x))


def test_the_card_says_what_the_checkpoint_holds(tmp_path):
    checkpoint(tmp_path / 'best.pt', data_dir='/home/me/photos', output='/home/me/run', lr=0.25)
    run('me/pets', '--checkpoint', tmp_path / 'best.pt', '--folder', tmp_path / 'pets', '--license', 'mit')
    text = (tmp_path / 'pets/README.md').read_text()
    _, head, body = text.split('---\n', 2)
    assert yaml.safe_load(head) == dict(
        tags=['image-classification', 'timm', 'transformers', 'vmamba'],
        pipeline_tag='image-classification',
        library_name='timm',
        license='mit',
    )
    assert json.loads((tmp_path / 'pets/config.json').read_text())['pretrained_cfg']['license'] == 'mit'
    assert '# Model card for pets' in body and 'classifies images into 3 classes' in body
    assert '- **Classes:** cat, dog, eel\n' in body and '- **Weights:** trained by `vmamba train`\n' in body
    assert '62.50 % top-1, 87.25 % top-5 on the validation images of its training, after epoch 5' in body
    assert '32 x 32 pixels, 3 channel(s); crop 0.8 (center), bicubic, mean [0.485, 0.456, 0.406]' in body
    (recipe,) = re.findall(r'```yaml\n(.*?)```', body, re.DOTALL)
    settings = dict(model='vim_nano', model_args=MODELS['vim_nano'], data_dir='photos', crop_pct=0.8, lr=0.25)
    assert yaml.safe_load(recipe) == dict(settings, epochs=7) and '/home/me' not in text
    assert 'title={Vision Mamba: Efficient' in body and 'journal={arXiv:2401.09417}' in body


@pytest.mark.parametrize('in_chans', [3, 1])
def test_the_code_of_the_card_runs(in_chans, tmp_path, hub, monkeypatch, capsys):
    pytest.importorskip('transformers')
    model = checkpoint(tmp_path / 'best.pt', in_chans=in_chans)
    run('me/pets', '--checkpoint', tmp_path / 'best.pt')
    assert 'Uploaded https://huggingface.co/me/pets/commit/' in capsys.readouterr().out
    text = (hub.folder_of('me/pets') / 'README.md').read_text()
    photo().save(tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
        names = {}
        exec(code, names)
        if 'output' in names:
            torch.testing.assert_close(names['output'], model(names['image'][None]))
        else:
            pixels = names['processor'](Image.open('photo.jpg').convert('RGB' if in_chans == 3 else 'L'))
            assert names['model'](**pixels).logits.shape == (1, 3)
    (command,) = re.findall(r'^vmamba (.*)$', text, re.MULTILINE)
    monkeypatch.setattr(sys, 'argv', ['vmamba'])
    vmamba_cli.main([*command.split(), '--device', 'cpu', '--workers', '0'])
    out = capsys.readouterr().out
    assert all(re.search(rf'%  {label}\n', out) for label in ('cat', 'dog', 'eel'))


def test_the_code_of_the_documentation_runs(tmp_path, hub):
    pytest.importorskip('transformers')
    checkpoint(tmp_path / 'best.pt', 'vmamba_nano')
    run('me/pets', '--checkpoint', tmp_path / 'best.pt')
    page = (ROOT / 'docs/deployment.md').read_text().partition('## Hub and transformers\n')[2].partition('\n## ')[0]
    names = {}
    for code in re.findall(r'```python\n(.*?)```', page, re.DOTALL):
        exec(code.replace('vmamba_t', 'vmamba_nano'), names)
    assert names['names'] == ['cat', 'dog', 'eel']
    assert names['segmentor'].eval()(torch.randn(1, 3, 32, 32)).logits.shape == (1, 19, 32, 32)


def test_a_model_without_classifier_is_uploaded_for_features(tmp_path):
    model = timm.create_model('vmamba_nano', num_classes=0, **STAGES).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    args = '--model', f'vmamba_nano={tmp_path}/weights.pth', '--model-args', json.dumps(STAGES)
    run('me/maps', *args, '--folder', tmp_path / 'maps')
    text = (tmp_path / 'maps/README.md').read_text()
    assert 'pipeline_tag: image-feature-extraction\n' in text and 'license: unknown\n' in text
    assert '# features [1, 64]' in text and 'vmamba extract photos/ --model hf-hub:me/maps' in text
    assert 'Classes' not in text and 'Accuracy' not in text and '## Training' not in text
    x = torch.randn(1, 3, 32, 32)
    loaded = timm.create_model(f'local-dir:{tmp_path}/maps', pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x))


def test_a_card_that_is_there_is_kept(tmp_path, hub, capsys):
    checkpoint(tmp_path / 'best.pt')
    hub().create_repo('me/pets')
    card = hub.folder_of('me/pets') / 'README.md'
    card.write_text('written by hand')
    run('me/pets', '--checkpoint', tmp_path / 'best.pt')
    assert 'Kept the README.md of me/pets' in capsys.readouterr().out
    assert card.read_text() == 'written by hand' and card.with_name('model.safetensors').is_file()


@pytest.mark.parametrize(
    'name, licence, accuracy',
    [
        ('vmamba_t', 'mit', '82.60 %'),
        ('mambavision_l2.in21k_ft_in1k_512', 'cc-by-nc-sa-4.0', '87.30 %'),
        ('vssd_t', 'unknown', '83.60 %'),
    ],
)
def test_published_weights_keep_their_licence_and_figures(name, licence, accuracy):
    model = timm.create_model(name, device='meta')
    model.class_names = None
    text = make_card(model, 'me/copy', None, license_of(model, None))
    assert f'\nlicense: {licence}\n' in text
    assert f'- **Accuracy:** {accuracy} top-1 on ImageNet-1K, published, not measured here\n' in text
    assert f'- **Weights:** the official ones, {model.pretrained_cfg["origin_url"]} (licence: ' in text


def test_a_fine_tuned_model_has_the_licence_of_the_weights_that_it_started_from():
    model = timm.create_model('mambavision_t', device='meta')
    config = Config(model='mambavision_t', pretrained=True)
    facts = describe(config, data_config_of(config, model), 3, None)
    for recipe, licence in ((vars(config), 'cc-by-nc-sa-4.0'), (vars(Config(model='mambavision_t')), 'unknown')):
        assert license_of(model, {'config': facts, 'recipe': recipe}) == licence
    started = {'config': facts, 'recipe': vars(Config(model='mambavision_t', checkpoint='/home/me/older.pt'))}
    model.class_names = None
    assert '- **Weights:** fine-tuned from `older.pt`\n' in make_card(model, 'me/pets', started, 'mit')
    # A checkpoint to resume from: its configuration is the recipe.
    assert license_of(model, {'config': vars(config), 'data': {'classes': None}, 'num_classes': 3}) == 'cc-by-nc-sa-4.0'


def test_papers_are_those_of_the_citation_file():
    cited = {
        reference['url'].rpartition('/')[2]: (
            reference['title'],
            ' and '.join(f'{author["family-names"]}, {author["given-names"]}' for author in reference['authors']),
        )
        for reference in yaml.safe_load((ROOT / 'CITATION.cff').read_text())['references']
    }
    assert PAPERS == {paper: cited[paper] for paper in PAPERS}
    for name in timm.list_models(module=['adventurer', 'mambavision', 'vim', 'vmamba', 'vssd']):
        papers = timm.get_pretrained_cfg(name).paper_ids
        assert {paper.partition(':')[2] for paper in ([papers] if isinstance(papers, str) else papers)} <= set(PAPERS)


def test_problems_are_one_line(tmp_path, hub, monkeypatch, capsys):
    weights = tmp_path / 'best.pt'
    checkpoint(weights)
    folder = '--folder', tmp_path / 'pets'
    for repo in ('pets', 'https://huggingface.co/me/pets', 'me/my pets'):
        assert 'argument OWNER/NAME: must be OWNER/NAME' in error_of(capsys, repo, '--checkpoint', weights)
    assert 'vim_nano=untrained has no weights of its own' in error_of(
        capsys, 'me/pets', '--model', 'vim_nano=untrained', *folder
    )
    assert 'hf-hub:me/pets has no weights of its own' in error_of(capsys, 'me/pets', '--model', 'hf-hub:me/pets')
    wrong = f'vssd_nano={weights}'
    assert f'the checkpoint is of vim_nano: give vim_nano={weights}' in error_of(capsys, 'me/x', '--model', wrong)
    unfit = '--checkpoint', weights, '--model-args', '{depth: 2}', *folder
    assert 'missing: blocks.1.' in error_of(capsys, 'me/pets', *unfit)
    assert 'there is no checkpoint absent.pt' in error_of(capsys, 'me/pets', '--checkpoint', 'absent.pt')
    assert f'{tmp_path} exists; name another --folder' in error_of(
        capsys, 'me/pets', '--checkpoint', weights, '--folder', tmp_path
    )
    assert 'cannot write' in error_of(capsys, 'me/pets', '--checkpoint', weights, '--folder', tmp_path / 'no/pets')
    monkeypatch.setattr(push, 'get_token', lambda: None)
    assert 'no token of the Hugging Face Hub: `hf auth login`' in error_of(capsys, 'me/pets', '--checkpoint', weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['best.pt']


@pytest.mark.parametrize('kind', [HfHubHTTPError.__bases__[0], ConnectionError])
def test_a_hub_that_refuses_is_one_line(kind, tmp_path, hub, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise kind('403 Forbidden\n\nyou may not')

    checkpoint(tmp_path / 'best.pt')
    monkeypatch.setattr(hub, 'upload_folder', refuse)
    error = error_of(capsys, 'me/pets', '--checkpoint', tmp_path / 'best.pt')
    assert error == 'push.py: error: cannot upload to me/pets: 403 Forbidden you may not'


def test_models_of_the_hub_are_named_on_the_command_line(tmp_path, hub, monkeypatch, capsys):
    from vmamba.tools import extract_features, predict

    checkpoint(tmp_path / 'best.pt')
    run('me/pets', '--checkpoint', tmp_path / 'best.pt')
    photo().save(tmp_path / 'photo.png')
    options = '--device', 'cpu', '--workers', '0'
    extract = [str(tmp_path / 'photo.png'), '--native', '--output', str(tmp_path / 'features'), *options]
    extract_features.main([*extract, '--model', f'local-dir:{hub.folder_of("me/pets")}'])
    assert list((tmp_path / 'features').glob('**/*.npy'))

    def error_of_predict(name):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            predict.main([str(tmp_path / 'photo.png'), '--model', name, *options])
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        return error

    assert 'hf-hub:me/absent: ' in error_of_predict('hf-hub:me/absent')
    assert 'hf-hub:me/pets has its own weights; leave out =other.pt' in error_of_predict('hf-hub:me/pets=other.pt')
    (hub.folder_of('me/pets') / 'config.json').write_text('{"pretrained_cfg": {}}')
    assert "its config.json is not of a timm model: it has no 'architecture'" in error_of_predict('hf-hub:me/pets')
