import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from folders import full_disk, truncate, write_digits
from timm.data import IMAGENET_DEFAULT_MEAN
from training_runs import SMALL, signals_kept

from vmamba.tools import train, validate, weights

TOOL = Path(validate.__file__)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Ten class folders of three digits each."""
    return write_digits(tmp_path_factory.mktemp('digits') / 'val', per_class=3)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The weights of a fresh vmamba_nano of ten classes."""
    path = tmp_path_factory.mktemp('checkpoint') / 'digits.pth'
    torch.manual_seed(0)
    torch.save({'model': timm.create_model('vmamba_nano', num_classes=10).state_dict()}, path)
    return path


def run(*arguments):
    validate.main([*map(str, arguments), '--workers', '0', '--device', 'cpu'])


def read(folder):
    return list(csv.DictReader((folder / 'validate.csv').open()))


def failure(capsys, *arguments):
    """The message of a call that ends with code 2 and one line."""
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith('validate.py: error: ') and message.count('\n') == 1
    return message


def expected_accuracy(checkpoint, digits, size):
    """Top-1 by hand, of images preprocessed by timm's transform."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    overlay = dict(file=str(checkpoint), num_classes=10)
    model = timm.create_model('vmamba_nano', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform = create_transform(**{**config, 'input_size': (3, size, size)})
    paths = sorted(digits.rglob('*.png'))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(path).convert('RGB')) for path in paths]))
    right = logits.topk(5).indices == torch.tensor([int(path.parent.name) for path in paths])[:, None]
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(1).float().mean().item()


def test_accuracy_against_resolution(digits, checkpoint, tmp_path, capsys):
    models = f'vmamba_nano={checkpoint}', 'vim_nano=untrained'
    run(digits, '--models', *models, '--num-classes', 10, '--img-size', 32, 48, '--output', tmp_path)
    rows = read(tmp_path)
    assert [(row['model'], row['img_size']) for row in rows] == [
        (model, size) for model in ('vmamba_nano', 'vim_nano') for size in ('32', '48')
    ]
    for row, size in zip(rows, (32, 48)):
        expected = expected_accuracy(checkpoint, digits, size)
        assert (float(row['top1']), float(row['top5'])) == pytest.approx(expected)
        assert (row['images'], row['unreadable'], row['published_top1']) == ('30', '0', '')
    assert (tmp_path / 'validate.png').read_bytes().startswith(b'\x89PNG')
    assert 'not measured' in capsys.readouterr().out


def test_greyscale_models_and_other_preprocessing(digits, tmp_path):
    options = '--model-args', '{in_chans: 1, depths: [1, 1, 1, 1]}', '--num-classes', 10, '--mean', 0.5, '--std', 0.25
    options = *options, '--crop-pct', 0.875, '--precision', 'bf16'
    run(digits, '--models', 'vmamba_nano=untrained', *options, '--output', tmp_path)
    (row,) = read(tmp_path)
    assert (row['images'], row['crop_pct'], row['img_size'], row['precision']) == ('30', '0.875', '32', 'bf16')


GREY = '--in-chans', '1', '--img-size', '48', '--crop-pct', '0.75'


@pytest.mark.parametrize(
    'model, options',
    [
        ('vmamba_nano', (*GREY, '--model-args', '{depths: [1, 1, 1, 1]}', '--ema-decay', '0.5')),
        ('vim_nano', (*GREY, '--model-args', '{stride: 8}')),
        ('vmamba_nano', ()),
    ],
)
def test_a_checkpoint_is_validated_as_its_training_did(tmp_path, model, options):
    for split, start in (('train', 0), ('validation', 20)):
        write_digits(tmp_path / split, per_class=12, classes=3, start=start)
    common = '--data', '', '--data-dir', tmp_path, '--output', tmp_path / 'run', '--batch-size', 12, '--lr', 2e-3
    with signals_kept():
        train.main([str(text) for text in (*SMALL, *common, '--model', model, *options)])
    best = torch.load(tmp_path / 'run' / 'best.pt', weights_only=True)
    logged = best['ema_top1'] if best.get('averaged', 'ema_top1' in best) else best['val_top1']
    run(tmp_path / 'validation', '--models', f'{model}={tmp_path}/run/best.pt', '--output', tmp_path)
    (row,) = read(tmp_path)
    assert float(row['top1']) == pytest.approx(logged, abs=1e-4)
    assert (row['img_size'], row['crop_pct']) == (('48', '0.75') if options else ('32', '1.0'))
    spec = weights.parse_spec(f'{model}={tmp_path}/run/best.pt')
    args = validate.parse_args(['.', '--models', str(spec), '--std', '0.25'])
    for one in (spec, spec.untrained()):
        loaded = weights.load_model(one, args)
        config = weights.data_config(loaded, args, weights.own_size(loaded))
        expected = ((1, 48, 48), (0.5,), (0.25,)) if options else ((3, 32, 32), IMAGENET_DEFAULT_MEAN, (0.25,) * 3)
        assert (config['input_size'], config['mean'], config['std']) == expected
        loaded(torch.zeros(1, *config['input_size']))


def test_a_checkpoint_may_tell_its_preprocessing(tmp_path):
    told = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', crop_mode='squash', crop_pct=0.9)
    config = {'model': 'vmamba_nano', 'model_args': {}, 'in_chans': 3, 'img_size': 40, **told}
    torch.save({'state_dict': timm.create_model('vmamba_nano').state_dict(), 'config': config}, tmp_path / 'best.pt')
    spec = weights.parse_spec(f'vmamba_nano={tmp_path}/best.pt')
    args = validate.parse_args(['.', '--models', str(spec), '--crop-mode', 'border'])
    expected = dict(told, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_mode='border', input_size=(3, 40, 40))
    assert weights.data_config(weights.load_model(spec, args), args) == expected


def test_a_checkpoint_of_another_model_is_named(digits, tmp_path, capsys):
    config = {'model': 'vim_nano', 'model_args': {}, 'in_chans': 3}
    torch.save({'state_dict': {}, 'config': config}, tmp_path / 'best.pt')
    message = failure(capsys, digits, '--models', f'vmamba_nano={tmp_path}/best.pt', '--output', tmp_path)
    assert f'the checkpoint is of vim_nano: give vim_nano={tmp_path}/best.pt' in message


def test_vim_keeps_the_size_of_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model('vim_nano', img_size=64, num_classes=10)
    torch.save(trained.state_dict(), tmp_path / 'vim.pth')
    spec = weights.parse_spec(f'vim_nano={tmp_path / "vim.pth"}')
    model = weights.load_model(spec, validate.parse_args(['.', '--models', str(spec)]))
    assert weights.own_size(model) == 64 and model.num_classes == 10
    assert torch.equal(model.pos_embed, trained.pos_embed)
    twin = weights.load_model(spec.untrained(), validate.parse_args(['.', '--models', str(spec)]))
    assert weights.own_size(twin) == 64
    larger = weights.at_size(model, 96)
    assert weights.own_size(larger) == 96 and weights.own_size(model) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_model_on_a_gpu_is_resized():
    """timm's Swin makes its new masks on the CPU."""
    model = timm.create_model('swin_tiny_patch4_window7_224', depths=(2, 2), embed_dim=32, num_heads=(1, 2)).cuda()
    larger = weights.at_size(model, 448).cuda()
    assert larger(torch.randn(1, 3, 448, 448, device='cuda')).shape == (1, 1000)


def test_published_figures_stand_beside_the_measured(digits, tmp_path, monkeypatch, capsys):
    published = {'vmamba_nano': validate.published('vim_s', 224, 1000)._replace(size=32)}
    monkeypatch.setattr('vmamba.tools.published.PUBLISHED', published)
    run(digits, '--models', 'vmamba_nano=untrained', '--img-size', 32, 36, '--output', tmp_path)
    first, second = read(tmp_path)
    assert (first['published_top1'], first['published_top5']) == ('80.5', '95.1')
    assert second['published_top1'] == ''
    assert '80.50' in capsys.readouterr().out


def test_folders_are_imagenets_synsets_or_numbers():
    from vmamba.tools.images.labelled_folders import class_indices

    assert class_indices('v2', ['0', '2', '10'], 1000) == [0, 2, 10]
    assert class_indices('few', ['n01440764', 'n01443537'], 1000) == [0, 1]
    assert class_indices('mapped', ['b', 'a'], 7, {'a': 0, 'b': 5}) == [5, 0]


def test_real_labels(tmp_path):
    images = write_digits(tmp_path / 'val', per_class=2, classes=2)
    for number, path in enumerate(sorted(images.rglob('*.png')), start=1):
        path.rename(path.with_name(f'ILSVRC2012_val_{number:08d}.png'))
    (tmp_path / 'real.json').write_text(json.dumps([list(range(1000)), [], list(range(1000)), []]))
    common = images, '--models', 'vmamba_nano=untrained', '--output', tmp_path
    run(*common, '--real-labels', tmp_path / 'real.json')
    (row,) = read(tmp_path)
    assert (row['images'], row['top1'], row['labels']) == ('2', '100.0', 'real')
    for path in images.rglob('*.png'):
        path.rename(images / path.name)  # as in the official archive of the validation images
    for folder in [path for path in images.iterdir() if path.is_dir()]:
        folder.rmdir()
    run(*common, '--real-labels')  # timm's copy
    assert [read(tmp_path)[0][key] for key in ('labels', 'images')] == ['real', '3']  # one has none


def test_a_narrow_terminal_shows_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate, 'WIDTH', 70)
    roots = [write_digits(tmp_path / part / 'val', per_class=1, classes=2) for part in 'ab']
    run(*roots, '--models', 'test_vit=untrained', '--num-classes', 2, '--output', tmp_path)
    assert [row['data'] for row in read(tmp_path)] == [str(root) for root in roots]
    lines = [line for line in capsys.readouterr().out.splitlines() if '│' in line]
    columns = [''.join(cells).replace(' ', '') for cells in zip(*(line.strip('│').split('│') for line in lines))]
    assert '…' not in ''.join(columns)
    assert columns[:2] == ['test_vit' * 2, 'untrained' * 2] and columns[2] == ''.join(map(str, roots))
    assert columns[-2].count('100.00') == 2  # top-5 of two classes


def test_a_link_that_leads_up_changes_nothing(digits, checkpoint, tmp_path):
    (tmp_path / 'val').mkdir()
    for folder in digits.iterdir():
        (tmp_path / 'val' / folder.name).symlink_to(folder, target_is_directory=True)
    (tmp_path / 'val/2').unlink()
    shutil.copytree(digits / '2', tmp_path / 'val/2')
    (tmp_path / 'val/2/up').symlink_to('..', target_is_directory=True)
    for root, output in ((digits, 'plain'), (tmp_path / 'val', 'linked')):
        run(root, '--models', f'vmamba_nano={checkpoint}', '--output', tmp_path / output)
    (plain,), (linked,) = (read(tmp_path / name) for name in ('plain', 'linked'))
    assert [linked[key] for key in ('images', 'top1', 'top5')] == [plain[key] for key in ('images', 'top1', 'top5')]


@pytest.mark.parametrize('name, size', [('validate.csv', 100), ('validate.png', 2000)])
def test_a_full_disk_is_one_line_with_the_file(digits, tmp_path, capsys, name, size):
    options = '--num-classes', 10, '--img-size', 32, 48, '--output', tmp_path
    with full_disk(size):
        message = failure(capsys, digits, '--models', 'test_vit=untrained', *options)
    assert f'cannot write {tmp_path / name}: File too large' in message
    assert not list(tmp_path.glob('.*')) and not (tmp_path / name).exists()


def test_what_is_given_twice_is_an_error(digits, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(digits, digits, '--models', 'test_vit=untrained', '--num-classes', 10, '--output', tmp_path)
    assert f'{digits} is there more than once' in capsys.readouterr().err


def test_corruptions(tmp_path, capsys):
    for severity in ('1', '5'):
        write_digits(tmp_path / 'c' / 'blur' / 'defocus_blur' / severity, per_class=1, classes=2)
    write_digits(tmp_path / 'c' / 'fog' / '3', per_class=1, classes=2)
    run(tmp_path / 'c', '--models', 'test_vit=untrained', '--imagenet-c', '--output', tmp_path)
    assert {row['crop_pct'] for row in read(tmp_path)} == {'1.0'}  # the benchmark does not resize its images
    assert {row['data'] for row in read(tmp_path)} == {'blur/defocus_blur/1', 'blur/defocus_blur/5', 'fog/3'}
    printed = capsys.readouterr().out
    assert 'defocus_blur' in printed and 'mean of 2' in printed


def test_weights_of_one_model_are_told_apart(tmp_path, capsys):
    write_digits(tmp_path / 'c' / 'fog' / '3', per_class=1, classes=2)
    model = timm.create_model('vmamba_nano')
    specs = []
    for name, always in (('half', 0), ('wrong', 5)):
        model.head.fc.bias.data = 1e6 * torch.nn.functional.one_hot(torch.tensor(always), 1000).float()
        torch.save(model.state_dict(), tmp_path / f'{name}.pth')
        specs.append(f'vmamba_nano={tmp_path / name}.pth')
    sizes = '--img-size', 32, 36
    run(tmp_path / 'c', '--models', *specs, specs[0], '--imagenet-c', *sizes, '--output', tmp_path)
    printed = ''.join(capsys.readouterr().out.split())
    assert printed.count('fog│50.00') == printed.count('fog│100.00') == 2
    assert len(read(tmp_path)) == 4  # what is named twice is measured once
    rows = pd.read_csv(tmp_path / 'validate.csv').assign(published_top1=9)
    labels = [f'vmamba_nano, {tmp_path}/{name}.pth' for name in ('half', 'wrong')]
    measured, _ = validate.accuracy_lines(rows)
    assert {label: dict(line) for label, line in measured.items()} == {
        labels[0]: {32: 50, 36: 50},
        labels[1]: {32: 0, 36: 0},
    }
    one = [{label: dict(line) for label, line in lines.items()} for lines in validate.accuracy_lines(rows[:2])]
    assert one == [{'vmamba_nano': {32: 50, 36: 50}}, {'vmamba_nano': {32: 9, 36: 9}}]


def test_unreadable_images_are_named_and_left_out_only_by_the_flag(tmp_path, capsys):
    images = write_digits(tmp_path / 'val', per_class=2, classes=3)
    broken = truncate(images / '1' / '01.png')
    (images / '2' / '00.png').write_text('no image')
    common = images, '--models', 'vmamba_nano=untrained', '--output', tmp_path
    message = failure(capsys, *common)
    assert str(broken) in message and '--skip-bad-images' in message
    run(*common, '--skip-bad-images')
    assert 'skipped 2 unreadable image(s)' in capsys.readouterr().out
    assert (read(tmp_path)[0]['images'], read(tmp_path)[0]['unreadable']) == ('4', '2')


def test_an_empty_class_folder_is_named_and_keeps_its_index(tmp_path, capsys):
    images = write_digits(tmp_path / 'val', per_class=1, classes=3)
    (images / '1' / '00.png').unlink()
    run(images, '--models', 'vmamba_nano=untrained', '--num-classes', 3, '--output', tmp_path)
    assert 'val: 1 class folders without images: 1' in capsys.readouterr().out
    assert read(tmp_path)[0]['images'] == '2'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['absent', '--models', 'vmamba_nano=untrained'], 'there is no folder absent'),
        (['.', '--models', 'vmamba_nan=untrained'], "unknown model 'vmamba_nan'; did you mean vmamba_nano"),
        (['.', '--models', 'vmamba_nano'], 'vmamba_nano has no published weights: give a checkpoint'),
        (['.', '--models', 'vmamba_nano=absent.pth'], 'there is no checkpoint file absent.pth'),
        (['.', '--models', 'vmamba_nano=untrained', '--num-classes', '7'], 'has 10 class folders, but the model has 7'),
        (['.', '--models', 'vmamba_nano=FILE', '--num-classes', '7'], 'head.fc.weight (10, 256) instead of (7, 256)'),
        (['.', '--models', 'vim_nano=untrained', '--num-classes', '10', '--img-size', '33'], '--img-size 33: image si'),
        (['.', '--models', 'vmamba_nano=untrained', '--imagenet-c'], 'has no folders CORRUPTION/SEVERITY'),
        (['.', '--models', 'vmamba_nano=untrained', '--real-labels'], 'has no real labels: names must be ILSVRC2012'),
        (['.', '--models', 'vmamba_nano=untrained', '--class-map', 'absent'], 'there is no class map absent'),
        (['.', '--models', 'vmamba_nano=untrained', '--class-map', 'FILE'], 'digits.pth is no text file'),
        (['.', '--models', 'vmamba_nano=untrained', '--model-args', '{depth: 3}'], "unexpected keyword argument 'de"),
        (['.', '--models', 'vmamba_nano=README', '--num-classes', '10'], 'README is not a readable checkpoint'),
    ],
)
def test_failures_are_one_line(digits, checkpoint, tmp_path, capsys, arguments, message):
    replaced = {'.': str(digits)}
    (tmp_path / 'README').write_text('no weights')
    arguments = [replaced.get(text, text).replace('FILE', str(checkpoint)) for text in arguments]
    arguments = [text.replace('README', str(tmp_path / 'README')) for text in arguments]
    assert message in failure(capsys, *arguments, '--output', tmp_path)


def test_what_was_measured_before_a_failure_is_shown(digits, tmp_path, capsys):
    options = '--num-classes', 10, '--img-size', 32, 40, 34, '--output', tmp_path
    with pytest.raises(SystemExit):
        run(digits, '--models', 'vim_nano=untrained', *options)
    printed = capsys.readouterr()
    assert printed.out.count('vim_nano') == 2 and '--img-size 34: image size' in printed.err
    assert len(read(tmp_path)) == 2 and (tmp_path / 'validate.png').is_file()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--imgsize', '32'], "unknown option '--imgsize'; did you mean --img-size"),
        (['--workers', '-1'], "must be a whole number above -1, got '-1'"),
        (['--model-args', 'depths'], "must be keys and values such as '{stride: 6, in_chans: 1}', got 'depths'"),
        (['--model-args', '{stride: 6, stride: 8}'], "is not valid YAML: the key 'stride' is there twice in line 1"),
        (['--std', '0'], "must be a number above 0, got '0'"),
    ],
)
def test_wrong_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run('.', '--models', 'vmamba_nano', *arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_script_ends_without_a_traceback(tmp_path):
    command = [sys.executable, TOOL, tmp_path / 'absent', '--models', 'vmamba_nano=untrained']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f'validate.py: error: there is no folder {tmp_path / "absent"}\n'
