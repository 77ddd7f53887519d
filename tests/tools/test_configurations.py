"""Configurations found by name, listed and copied."""

from pathlib import Path

import pytest

from vmamba.configs import FOLDER, config_files, find_config
from vmamba.tools import configurations
from vmamba.tools.training.config import load_config

NAME = 'vmamba-s_upernet_8xb2-amp-160k_ade20k-640x640'


@pytest.mark.parametrize(
    'text', ['vim_t', 'vim_t.yaml', 'classification/vim_t.yaml', 'configs/classification/vim_t.yaml']
)
def test_an_installed_configuration_is_found_anywhere(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(text)) == FOLDER / 'classification/vim_t.yaml'


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('vim_t.yaml').write_text('_base_: configs/classification/vim_t.yaml\nepochs: 30\n')
    assert find_config(Path('vim_t.yaml')) == Path('vim_t.yaml')
    config = load_config(Path('vim_t.yaml'), {})
    assert (config.model, config.epochs) == ('vim_t', 30)


@pytest.mark.parametrize(
    'text, hint',
    [
        ('vim_tt.yaml', 'did you mean vim_t'),
        ('_vim', ''),
        ('qqqq', '`vmamba configs list`'),
        ('/vim_t', ''),
        ('a/vim_t', ''),
    ],
)
def test_the_nearest_configuration_is_named(text, hint):
    with pytest.raises(FileNotFoundError, match=f'there is no configuration {text}; .*{hint}'):
        find_config(Path(text))


def test_list_names_all_that_can_be_run(capsys):
    configurations.main(['list', 'vim_t*'])
    assert capsys.readouterr().out.split() == ['classification', 'vim_t', 'classification', 'vim_t_stride8']
    assert not any(name.startswith('_') for name in config_files())


@pytest.mark.parametrize('name', ['vim_t', NAME])
def test_a_copy_is_complete(tmp_path, name):
    configurations.main(['copy', name, '--output', str(tmp_path / 'mine')])
    copied = {path.relative_to(tmp_path / 'mine').as_posix(): path for path in (tmp_path / 'mine').rglob('*.*')}
    folder = find_config(Path(name)).parent
    assert all(path.read_text() == (folder / text).read_text() for text, path in copied.items())
    if name == 'vim_t':
        assert load_config(copied['vim_t.yaml'], {}) == load_config(Path(name), {})
    else:
        mmengine = pytest.importorskip('mmengine.config')
        ours, theirs = (mmengine.Config.fromfile(path) for path in (copied[f'{NAME}.py'], find_config(Path(name))))
        assert ours.to_dict() == theirs.to_dict()


def test_a_copy_replaces_nothing(tmp_path, capsys):
    (tmp_path / '_vim.yaml').write_text('epochs: 1\n')
    with pytest.raises(SystemExit) as error:
        configurations.main(['copy', 'vim_t', '--output', str(tmp_path)])
    assert error.value.code == 2 and '_vim.yaml exists and differs' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['_vim.yaml']


@pytest.mark.parametrize(
    'earlier, now',
    [
        ('mask-rcnn_vmamba-t-s2l5_fpn_ms-3x_coco', 'mask-rcnn_vmamba-t-s2l5_fpn_amp-ms-crop-3x_coco'),
        ('configs/detection/mask-rcnn_vmamba-t_fpn_1x_coco.py', 'mask-rcnn_vmamba-t_fpn_amp-1x_coco'),
        ('cascade-mask-rcnn_vim-s_fpn_lsj-100e_coco', 'cascade-mask-rcnn_vim-s_fpn_amp-lsj-100e_coco'),
        ('dino-4scale_vmamba-t_12e_coco', 'dino-4scale_vmamba-t_8xb2-12e_coco'),
        ('upernet_vim-t_60k_ade20k-512x512.py', 'vim-t_upernet_4xb8-amp-60k_ade20k-512x512'),
        ('upernet_vmamba-b-v0_160k_ade20k-512x512', 'vmamba-b-v0_upernet_8xb2-amp-160k_ade20k-512x512'),
        ('mask2former_vmamba-t_160k_ade20k-512x512', 'mask2former_vmamba-t_8xb2-160k_ade20k-512x512'),
        ('upernet_vmamba-nano_scenes', 'vmamba-nano_upernet_scenes'),
    ],
)
def test_a_configuration_is_found_by_its_earlier_name(earlier, now, caplog):
    assert find_config(Path(earlier)).stem == now
    assert caplog.messages == [f'the configuration {Path(earlier).name.removesuffix(".py")} is now named {now}']


def test_an_earlier_name_in_a_folder_of_the_user_is_not_replaced():
    with pytest.raises(FileNotFoundError):
        find_config(Path('mine/mask-rcnn_vmamba-t_fpn_1x_coco.py'))
