"""Files that hold no weights, weights that cannot be fetched, and Vim's own choices among what a file holds."""

import argparse
import os
import pickle
import sys
import zipfile
from urllib.error import HTTPError, URLError

import huggingface_hub.errors
import numpy
import official
import oracles
import pytest
import safetensors.torch
import timm
import torch

import vmamba  # noqa: F401, registers the models

SMALL = {
    'vmamba_s': dict(depths=(1, 1), embed_dim=8),
    'vim_t': dict(depth=1, embed_dim=16, img_size=32),
    'vim_b': dict(depth=1, embed_dim=16, img_size=32),
    'vim_t_stride8': dict(depth=1, embed_dim=16, img_size=32),
}


def load(path, variant='vim_t', **kwargs):
    kwargs = {**SMALL[variant], **kwargs}
    return timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs).eval()


def save_vim(path, state, **others):
    torch.save(
        {'model': state, 'optimizer': {'state': {}}, 'args': argparse.Namespace(lr=1e-3, model='vim'), **others}, path
    )
    return path


@torch.no_grad()
@pytest.mark.parametrize('variant,chosen', [('vim_t', 'model'), ('vim_b', 'model_ema')], ids=['plain', 'ema'])
def test_the_weights_whose_accuracy_is_published_are_chosen(tmp_path, variant, chosen):
    states = {name: official.vim_state(1, 16, 4) for name in ('model', 'model_ema')}
    path = save_vim(tmp_path / 'vim.pth', states['model'], model_ema=states['model_ema'])
    images = torch.randn(1, 3, 32, 32)
    assert oracles.relative_error(load(path, variant)(images), official.vim_logits(states[chosen], images)) < 1e-4


@torch.no_grad()
def test_the_scale_of_a_mixer_is_kept_with_and_without_layer_scale(tmp_path):
    state = official.vim_state(2, 16, 4, gamma=True)
    path = save_vim(tmp_path / 'vim.pth', state)
    images = torch.randn(1, 3, 32, 32)
    expected = official.vim_logits(state, images)
    assert oracles.relative_error(load(path, depth=2)(images), expected) < 1e-4
    scaled = load(path, depth=2, init_values=1.0)
    assert oracles.relative_error(scaled(images), expected) < 1e-4
    assert torch.equal(scaled.blocks[1].ls.gamma, state['layers.1.mixer.gamma'])


def resized_state(state, old, new):
    """The checkpoint as for another grid: the class token's entry moves from middle to middle."""
    entries, middle = state['pos_embed'], old[0] * old[1] // 2
    grid = torch.cat([entries[:, :middle], entries[:, middle + 1 :]], dim=1).unflatten(1, old)
    grid = oracles.resize_grid(grid, *new).flatten(1, 2)
    half = new[0] * new[1] // 2
    resized = torch.cat([grid[:, :half], entries[:, middle : middle + 1], grid[:, half:]], dim=1)
    return {**state, 'pos_embed': resized}


@torch.no_grad()
@pytest.mark.parametrize(
    'variant,stride,old,size',
    [
        pytest.param('vim_t', 16, (3, 3), (64, 48), id='odd-to-even'),
        pytest.param('vim_t', 16, (4, 4), (48, 80), id='even-to-odd'),
        pytest.param('vim_t_stride8', 8, (3, 3), (48, 32), id='overlapping'),
        pytest.param('vim_t', 16, (6, 6), (64, 144), id='same-number-of-patches'),
    ],
)
def test_the_position_embedding_is_resized_around_its_class_token(tmp_path, variant, stride, old, size):
    state = official.vim_state(1, 16, old[0] * old[1])
    model = load(save_vim(tmp_path / 'vim.pth', state), variant, img_size=size)
    new = tuple((side - 16) // stride + 1 for side in size)
    images = torch.randn(1, 3, *size)
    expected = official.vim_logits(resized_state(state, old, new), images, stride)
    assert oracles.relative_error(model(images), expected) < 1e-4


def test_a_position_embedding_that_is_no_square_is_an_error(tmp_path):
    path = save_vim(tmp_path / 'vim.pth', official.vim_state(1, 16, 7))
    with pytest.raises(RuntimeError, match='pos_embed'):
        load(path, img_size=48)


@torch.no_grad()
@pytest.mark.parametrize('in_chans', [1, 4])
def test_vim_adapts_its_patch_embedding_to_the_image_channels(tmp_path, in_chans):
    state = official.vim_state(1, 16, 4)
    model = load(save_vim(tmp_path / 'vim.pth', state), in_chans=in_chans)
    weight = state['patch_embed.proj.weight']
    expected = weight.sum(1, keepdim=True) if in_chans == 1 else torch.cat([weight, weight[:, :1]], 1) * 3 / 4
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)


@pytest.mark.parametrize('classes,shape', [(7, (7, 16)), (0, None)], ids=['seven', 'none'])
def test_vim_takes_another_classifier_only_when_asked(tmp_path, classes, shape):
    path = save_vim(tmp_path / 'vim.pth', official.vim_state(1, 16, 4))
    model = load(path, num_classes=classes)
    assert shape is None or model.head.weight.shape == shape
    hundred = save_vim(tmp_path / 'hundred.pth', official.vim_state(1, 16, 4, num_classes=100))
    assert load(hundred, num_classes=100).head.weight.shape == (100, 16)
    with pytest.raises(RuntimeError, match=r'head\.weight \(100, 16\) instead of \(1000, 16\)'):
        load(hundred)


@pytest.mark.parametrize(
    'official_key,own_key',
    [
        ('layers.0.mixer.A_b_log', r'blocks\.0\.mixer\.A_log'),
        ('layers.0.mixer.conv1d.bias', r'blocks\.0\.mixer\.conv1d_bias'),
        ('pos_embed', r'pos_embed'),
        ('norm_f.weight', r'norm\.weight'),
    ],
)
def test_vim_names_missing_and_unexpected_weights(tmp_path, official_key, own_key):
    state = official.vim_state(1, 16, 4)
    missing = {key: value for key, value in state.items() if key != official_key}
    with pytest.raises(RuntimeError, match=rf'missing: .*{own_key}'):
        load(save_vim(tmp_path / 'missing.pth', missing))
    with pytest.raises(RuntimeError, match=r'unexpected: .*conv2d_b'):
        load(save_vim(tmp_path / 'extra.pth', {**state, 'layers.0.mixer.conv2d_b.bias': torch.zeros(2)}))


def test_own_layout_of_vim_loads_from_safetensors(tmp_path):
    model = timm.create_model('vim_t', **SMALL['vim_t'])
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'own.safetensors')
    loaded = load(tmp_path / 'own.safetensors').state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def flip_a_bit(path, ending):
    """Damages the middle of an entry of an archive; returns the entry's name."""
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(ending))
    data = bytearray(path.read_bytes())
    names = int.from_bytes(data[entry.header_offset + 26 : entry.header_offset + 28], 'little')
    extra = int.from_bytes(data[entry.header_offset + 28 : entry.header_offset + 30], 'little')
    data[entry.header_offset + 30 + names + extra + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    return entry.filename


@pytest.mark.parametrize('ending', ['data/0', 'data/7', 'byteorder'])
def test_a_flipped_bit_is_an_error_that_names_the_entry(tmp_path, ending):
    path = save_vim(tmp_path / 'vim.pth', official.vim_state(1, 16, 4))
    name = flip_a_bit(path, ending)
    with pytest.raises(RuntimeError, match=rf'vim\.pth is not a readable checkpoint: .*{name} is damaged'):
        load(path)


def test_files_without_checksums_load(tmp_path):
    state = official.vim_state(1, 16, 4)
    torch.save({'model': state}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        save_vim(tmp_path / 'unsummed.pth', state)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / 'unsummed.pth') as archive:
        assert archive.testzip() is not None
    for name in ('old.pth', 'unsummed.pth'):
        assert torch.equal(load(tmp_path / name).head.weight, state['head.weight'])


ODD_TENSORS = {
    'sparse': ('head.bias', lambda bias: bias.to_sparse(), 'a sparse_coo tensor as head.bias'),
    'meta': ('head.bias', lambda bias: bias.to('meta'), 'a meta tensor as head.bias'),
    'key': (7, lambda bias: bias, 'the key 7'),
}


@pytest.mark.parametrize('given', ['file', 'state_dict'])
@pytest.mark.parametrize('key,change,message', ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_tensors_and_keys_that_are_no_weights_are_named(tmp_path, given, key, change, message):
    state = official.vim_state(1, 16, 4)
    state[key] = change(state['head.bias'])
    with pytest.raises(RuntimeError, match=f'^.*(vim.pth|checkpoint of vim_t) has {message}'):
        if given == 'file':
            load(save_vim(tmp_path / 'vim.pth', state))
        overlay = dict(state_dict=state)
        timm.create_model('vim_t', pretrained=True, pretrained_cfg_overlay=overlay, **SMALL['vim_t'])


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def write_bad_file(path, kind):
    state = official.vim_state(1, 16, 4)
    if kind == 'text':
        path.write_text('<html>Not Found</html>\n')
    elif kind == 'words':
        path.write_text('hello' * 100)
    elif kind == 'empty-file':
        path.write_bytes(b'')
    elif kind == 'truncated':
        torch.save({'model': state}, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == 'corrupt':
        torch.save({'model': state}, path)
        data = bytearray(path.read_bytes())
        data[100:400] = bytes(300)
        path.write_bytes(data)
    elif kind == 'empty-dict':
        torch.save({}, path)
    elif kind == 'empty-model':
        torch.save({'model': {}}, path)
    elif kind == 'no-tensors':
        torch.save({'model': {'epoch': 3}}, path)
    elif kind == 'list':
        torch.save([torch.zeros(2)], path)
    elif kind == 'malicious':
        torch.save({'model': state, 'args': Malicious(path.parent / 'ran')}, path)
    elif kind == 'malicious-pickle':
        path.write_bytes(pickle.dumps({'model': Malicious(path.parent / 'ran')}))


BAD_FILES = ['text', 'words', 'empty-file', 'truncated', 'corrupt', 'empty-dict', 'empty-model', 'no-tensors', 'list']


@pytest.mark.parametrize('variant', ['vmamba_s', 'vim_t'])
@pytest.mark.parametrize('kind', [*BAD_FILES, 'malicious', 'malicious-pickle'])
def test_a_file_without_weights_is_an_error_that_names_it(tmp_path, kind, variant):
    path = tmp_path / 'weights.pth'
    write_bad_file(path, kind)
    with pytest.raises(RuntimeError, match=r'weights\.pth') as caught:
        load(path, variant)
    assert 'download' not in str(caught.value)
    assert not str(caught.value).endswith(': '), 'no reason'
    assert not (tmp_path / 'ran').exists(), 'the file ran code'


@pytest.mark.parametrize('content', [b'', b'no safetensors at all', b'\xff' * 64], ids=['empty', 'text', 'bytes'])
def test_a_bad_safetensors_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / 'weights.safetensors').write_bytes(content)
    with pytest.raises(RuntimeError, match=r'weights\.safetensors'):
        load(tmp_path / 'weights.safetensors')


@pytest.mark.parametrize('variant', ['vmamba_s', 'vim_t'])
@pytest.mark.parametrize('name', ['missing.pth', 'missing.safetensors', ''], ids=['pth', 'safetensors', 'folder'])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, variant, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / name)):
        load(tmp_path / name, variant)


@pytest.mark.parametrize(
    'error',
    [
        URLError('no route to host'),
        HTTPError('https://github.com', 404, 'Not Found', None, None),
        TimeoutError('timed out'),
        ConnectionResetError('reset'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_vmamba_without_network_tells_to_pass_a_file(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm.models._builder.download_cached_file', refuse)
    with pytest.raises(RuntimeError, match=r'could not download.*vmamba_s.*pretrained_cfg_overlay=dict\(file='):
        timm.create_model('vmamba_s', pretrained=True, **SMALL['vmamba_s'])


@pytest.mark.parametrize(
    'error',
    [
        huggingface_hub.errors.LocalEntryNotFoundError('offline and not cached'),
        huggingface_hub.errors.OfflineModeIsEnabled('offline'),
        huggingface_hub.errors.HfHubHTTPError.__bases__[0]('refused by the HTTP client of its version'),
        ConnectionError('no route to host'),
        OSError('no space'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_vim_without_network_tells_to_pass_a_file(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm.models._hub.hf_hub_download', refuse)
    with pytest.raises(RuntimeError, match=r'could not download.*vim_t.*pretrained_cfg_overlay=dict\(file='):
        timm.create_model('vim_t', pretrained=True, **SMALL['vim_t'])


@torch.no_grad()
@pytest.mark.parametrize('variant', ['vmamba_s', 'vim_t'])
def test_a_downloaded_file_is_read_like_a_local_one(monkeypatch, tmp_path, variant):
    if variant == 'vim_t':
        state = official.vim_state(1, 16, 4)
        target, forward = 'timm.models._hub.hf_hub_download', official.vim_logits
    else:
        state = official.vmamba_state((1, 1), 8)
        target, forward = 'timm.models._builder.download_cached_file', official.vmamba_logits
    path = save_vim(tmp_path / 'downloaded.pth', state)
    monkeypatch.setattr(target, lambda *args, **kwargs: str(path))
    model = timm.create_model(variant, pretrained=True, **SMALL[variant]).eval()
    images = torch.randn(1, 3, 32, 32)
    assert oracles.relative_error(model(images), forward(state, images)) < 1e-4


@pytest.mark.parametrize('variant', ['vmamba_nano', 'vim_nano'])
def test_a_variant_without_published_weights_is_an_error(variant):
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model(variant, pretrained=True)


def histories():
    """What mmengine's runner stores of a run, its statistics by name included."""
    logging = pytest.importorskip('mmengine.logging')
    loss = logging.HistoryBuffer([0.5, 0.25], [1, 1])
    return {'log_scalars': {'train/loss': loss}, 'runtime_info': {'epoch': 12}}


@torch.no_grad()
def test_a_checkpoint_of_a_detectors_training_run_loads(tmp_path, monkeypatch):
    """The published dense checkpoints are files of mmengine's runner, which stores more than weights."""
    state = official.vmamba_state((1, 1, 1, 1), 8)
    backbone = {f'backbone.{key}': value for key, value in state.items() if not key.startswith('classifier.')}
    backbone.update({f'backbone.outnorm3.{name}': state[f'classifier.norm.{name}'] for name in ('weight', 'bias')})
    meta = {'cfg': 'model = dict()', 'epoch': 12, 'iter': 3, 'dataset_meta': {'classes': ('a', 'b')}}
    checkpoint = {'meta': meta, 'state_dict': backbone, 'message_hub': histories(), 'optimizer': {}}
    torch.save(checkpoint, tmp_path / 'epoch_12.pth')
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmengine']:
        monkeypatch.setitem(sys.modules, name, None)  # the file is read without mmengine
    model = load(tmp_path / 'epoch_12.pth', 'vmamba_s', depths=(1, 1, 1, 1), features_only=True)
    images = torch.randn(1, 3, 32, 32)
    for feature, expected in zip(model(images), official.vmamba_maps(state, images), strict=True):
        assert oracles.relative_error(feature.permute(0, 2, 3, 1), expected) < 1e-4


class CallsAMethod:
    """Unpickled, calls the method of an object that a checkpoint may hold: the method is fetched by getattr."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return numpy.zeros(3).tofile, (self.marker,)


def test_no_method_of_what_a_file_holds_is_called(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'model': official.vim_state(1, 16, 4), 'args': CallsAMethod(tmp_path / 'ran')}, path)
    with pytest.raises(RuntimeError, match=r'weights\.pth'):
        load(path)
    assert not (tmp_path / 'ran').exists(), 'the file ran code'


@torch.no_grad()
def test_a_checkpoint_with_its_runs_configuration_loads(tmp_path):
    """The official training scripts store a yacs configuration and a numpy accuracy beside the weights."""
    yacs = pytest.importorskip('yacs.config')
    state = official.vmamba_state((1, 1), 8)
    config = yacs.CfgNode({'MODEL': yacs.CfgNode({'TYPE': 'vssm'})})
    checkpoint = {'model': state, 'max_accuracy': numpy.float64(82.6), 'epoch': 264, 'config': config}
    torch.save(checkpoint, tmp_path / 'vssm.pth')
    images = torch.randn(1, 3, 32, 32)
    model = load(tmp_path / 'vssm.pth', 'vmamba_s')
    assert oracles.relative_error(model(images), official.vmamba_logits(state, images)) < 1e-4


@pytest.mark.parametrize('mixed', ['Vim-T at stride 16', 'Vim-T at stride 8'])
def test_a_position_embedding_that_gets_resized_is_reported(tmp_path, caplog, mixed):
    """A checkpoint of the other stride has the same keys: only its number of patches tells."""
    stride8 = mixed.endswith('8')
    path = save_vim(tmp_path / 'vim.pth', official.vim_state(1, 16, 4 if stride8 else 9))
    with caplog.at_level('INFO'):
        load(path, 'vim_t_stride8' if stride8 else 'vim_t')
    assert 'position embedding' in caplog.text or 'pos_embed' in caplog.text
    found, own = (('2x2', 16), 8) if stride8 else (('3x3', 8), 16)
    assert f'images of 32x32 have {found[0]} patches at stride {found[1]}' in caplog.text
    assert f'the model has stride {own}: the checkpoint may be of another variant' in caplog.text


@pytest.mark.parametrize(
    'variant,side,size,stride',
    [
        pytest.param('vim_t', 27, 224, 8, id='stride-8'),
        pytest.param('vim_t_stride8', 14, 224, 16, id='stride-16'),
        pytest.param('vim_t', 14, 448, None, id='larger-images'),
        pytest.param('vim_t', 14, 112, None, id='smaller-images'),
        pytest.param('vim_t', 6, (64, 144), None, id='another-shape'),
        pytest.param('vim_t', 27, 432, None, id='its-own'),
        pytest.param('vim_t', 1, 16, None, id='one-patch'),
    ],
)
def test_only_a_grid_of_another_stride_at_the_same_size_suggests_another_variant(
    tmp_path, caplog, variant, side, size, stride
):
    load(save_vim(tmp_path / 'vim.pth', official.vim_state(1, 16, side**2)), variant, img_size=size)
    assert ('another variant' in caplog.text) == (stride is not None)
    assert stride is None or f'images of 224x224 have {side}x{side} patches at stride {stride}' in caplog.text
