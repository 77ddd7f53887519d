"""Whole runs of train.py on tiny data, through its command line."""

import errno
import functools
import os
import re
import shlex
import shutil

import pytest
import torch
import yaml
from folders import full_disk, in_use
from training_runs import CONFIGS, ROOT, SMALL, image_folder, newest, rows, signals_kept

from vmamba.layers import auxiliary_loss
from vmamba.tools import train
from vmamba.tools.output_files import lock_folder
from vmamba.tools.training import engine
from vmamba.tools.user_errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore:Unable to enable fault handler')  # pytest has taken stderr

torch_compile = torch.compile  # a test puts another in its place


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns what it printed and its exit status."""
    monkeypatch.chdir(ROOT)

    def call(*args):
        status = 0
        with signals_kept():
            try:
                train.main([str(arg) for arg in args])
            except SystemExit as error:
                status = error.code
        out, err = capsys.readouterr()
        return out, err, status

    return call


@pytest.fixture
def fails(run):
    """Runs the command line, which has to end with one line of error; returns the line."""

    def call(*args):
        _, err, status = run(*args)
        assert status == 2, err
        assert 'Traceback' not in err
        return err.strip().splitlines()[-1]

    return call


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp('images'))


def test_a_run_leaves_its_records_and_learns(run, tmp_path):
    out, _, status = run(*SMALL, '--epochs', 4, '--output', tmp_path, '--log-every', 2, '--ema-decay', 0.9)
    assert status == 0
    assert 'test_vit: 0.30 M parameters, 2 classes, 1 process(es) on cpu, fp32' in out
    assert 'epoch 1 update 4/5: loss' in out
    assert 'images/s' in out and 'MiB' in out
    table = rows(tmp_path)
    assert [row['epoch'] for row in table] == [1, 2, 3, 4]
    assert table[-1]['train_loss'] < table[0]['train_loss']
    assert table[-1]['val_top1'] > 60
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    assert list((tmp_path / 'tensorboard').rglob('events*'))
    assert yaml.safe_load((tmp_path / 'config.yaml').read_text())['epochs'] == 4
    best = torch.load(tmp_path / 'best.pt', weights_only=True)
    assert max(best['val_top1'], best['ema_top1']) == max(max(row['val_top1'], row['ema_top1']) for row in table)
    assert best['averaged'] is (best['ema_top1'] >= best['val_top1'])
    assert best['recipe'] == yaml.safe_load((tmp_path / 'config.yaml').read_text())
    assert len(list(tmp_path.glob('checkpoint-*.pt'))) == 2


def test_a_cpu_trains_in_fp32_by_default(run, tmp_path):
    args = f'{CONFIGS}/synthetic.yaml', '--model', 'test_vit', '--synthetic-images', 8, '--batch-size', 4, '--epochs', 1
    options = '--warmup-epochs', 0, '--workers', 0, '--device', 'cpu', '--img-size', 32
    out, _, _ = run(*args, *options, '--output', tmp_path / 'run')
    assert ', fp32' in out and 'precision: fp32' in (tmp_path / 'run/config.yaml').read_text()


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision_on_synthetic_images(run, tmp_path, precision):
    args = *SMALL, '--data', 'synthetic', '--synthetic-images', 64, '--num-classes', 10, '--epochs', 3
    options = '--precision', precision, '--accumulate', 2, '--batch-size', 8, '--channels-last', '--grad-checkpointing'
    assert run(*args, *options, '--lr', 1e-2, '--output', tmp_path)[2] == 0
    table = rows(tmp_path)
    assert table[-1]['train_loss'] < table[0]['train_loss']
    assert 'val_top1' not in table[0]


@pytest.mark.parametrize('model', ['vmamba_nano', 'vim_nano', 'vmamba_nano_moe'])
def test_our_models_train_on_a_folder(run, folder, tmp_path, model):
    args = *SMALL, '--model', model, '--data', '', '--data-dir', folder, '--batch-size', 6, '--epochs', 1
    mixing = '--mixup', 0.8, '--cutmix', 1, '--drop-last', '--reprob', 0.5, '--aug-repeats', 3, '--workers', 1
    out, err, status = run(*args, *mixing, '--clip-mode', 'agc', '--clip-grad', 0.02, '--output', tmp_path)
    assert status == 0, err
    row = rows(tmp_path)[0]
    assert row['updates'] == 2 and row.get('max_expert_load', 1) >= 1 and ('max_expert_load' in row) == ('moe' in model)


def test_auxiliary_losses_are_trained_on(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(engine, 'auxiliary_loss', lambda model: seen.append(auxiliary_loss(model)) or 100 * seen[-1])
    _, err, status = run(*SMALL, '--model', 'vmamba_nano_moe', '--epochs', 1, '--output', tmp_path)
    assert status == 0, err
    assert len(seen) == rows(tmp_path)[0]['updates'] and all(loss.requires_grad for loss in seen)
    assert rows(tmp_path)[0]['train_loss'] > 100 * 5 * 0.01 > rows(tmp_path)[0]['val_loss']


def test_accumulation_learns_as_the_joined_batch(run, tmp_path):
    options = *SMALL, '--opt', 'sgd', '--lr', 0.05, '--epochs', 1
    run(*options, '--batch-size', 48, '--output', tmp_path / 'joined')
    run(*options, '--batch-size', 16, '--accumulate', 3, '--output', tmp_path / 'parts')
    joined, parts = rows(tmp_path / 'joined'), rows(tmp_path / 'parts')
    assert joined[0]['updates'] == 4  # 48, 48, 48 and 16 images
    assert parts[0]['train_loss'] == pytest.approx(joined[0]['train_loss'], rel=1e-4)
    assert parts[0]['val_loss'] == pytest.approx(joined[0]['val_loss'], rel=1e-4)


def test_fine_tuning_from_a_run_with_another_head(run, fails, folder, tmp_path):
    big = image_folder(tmp_path / 'three', classes=('ant', 'bee', 'cow'))
    data = *SMALL, '--data', '', '--batch-size', 6, '--epochs', 1, '--model', 'vmamba_nano'
    run(*data, '--data-dir', big, '--output', tmp_path / 'first')
    start = *data, '--data-dir', folder, '--checkpoint', tmp_path / 'first/best.pt', '--layer-decay', 0.7
    message = fails(*start, '--output', tmp_path / 'second')
    assert message.endswith('if only the classifier differs: --new-head')
    assert 'head.fc.weight (3, 256) instead of (2, 256)' in message or 'of another shape' in message
    assert run(*start, '--new-head', '--lr', 1e-9, '--output', tmp_path / 'second')[2] == 0
    ours, theirs = newest(tmp_path / 'second')['state_dict'], newest(tmp_path / 'first')['state_dict']
    assert torch.allclose(ours['stem.conv1.weight'], theirs['stem.conv1.weight'], atol=1e-5)
    scales = {group['lr_scale'] for group in newest(tmp_path / 'second')['optimizer']['param_groups']}
    assert max(scales) == 1 and len(scales) > 3


def test_distillation_from_a_teacher(run, tmp_path):
    run(*SMALL, '--epochs', 1, '--output', tmp_path / 'teacher')
    weights = tmp_path / 'teacher.pt'
    torch.save(newest(tmp_path / 'teacher')['state_dict'], weights)
    teacher = '--teacher', 'test_vit', '--teacher-checkpoint', weights, '--distill-temperature', 2
    _, err, status = run(*SMALL, '--epochs', 1, *teacher, '--output', tmp_path / 'student')
    assert status == 0, err
    assert rows(tmp_path / 'student')[0]['train_loss'] != rows(tmp_path / 'teacher')[0]['train_loss']
    assert newest(tmp_path / 'student')['state_dict'].keys() == newest(tmp_path / 'teacher')['state_dict'].keys()


def test_the_best_weights_are_the_average_only_where_it_scores_better(run, tmp_path):
    args = *SMALL, '--epochs', 5, '--ema-decay', 0.9999
    out, _, _ = run(*args, '--output', tmp_path / 'slow')
    best, last = torch.load(tmp_path / 'slow/best.pt', weights_only=True), rows(tmp_path / 'slow')[-1]
    assert last['val_top1'] > last['ema_top1'] + 10  # the average is still at the first weights
    assert best['averaged'] is False and 'state_dict_ema' not in best
    assert 'best.pt has the weights themselves' in out
    run(*args, '--ema-warmup', '--output', tmp_path / 'warm')
    assert rows(tmp_path / 'warm')[-1]['ema_top1'] > last['ema_top1'] + 10
    assert rows(tmp_path / 'warm')[-1]['val_top1'] == last['val_top1']


def test_fine_tuning_without_weights_is_told(run, tmp_path, monkeypatch):
    args = *SMALL, '--epochs', 1, '--layer-decay', 0.8, '--output', tmp_path
    told = 'test_vit starts from random weights; to fine-tune, give --pretrained or --checkpoint FILE'
    assert f'train.py: warning: {told}' in run(*args, '--output', tmp_path / 'script')[1]
    monkeypatch.setattr('sys.argv', ['vmamba train'])
    assert f'vmamba train: warning: {told}' in run(*args)[1]
    assert told not in run(*args, '--resume', '--epochs', 2)[1]


def test_an_existing_run_is_neither_overwritten_nor_mixed_with_another(run, fails, tmp_path):
    args = *SMALL, '--epochs', 1, '--output', tmp_path
    assert 'starting a new run' in run(*args, '--resume')[0]
    assert '--resume continues it' in fails(*args)
    message = fails(*args, '--resume', '--weight-decay', 0.1)
    assert 'weight_decay 0.05, now 0.1; give what it had, or another --output' in message
    assert 'images per update 32, now 16' in fails(*args, '--resume', '--batch-size', 16)
    out, err, status = run(*args, '--resume', '--epochs', 2)
    assert 'resumed from' in out and status == 0, err
    assert [row['epoch'] for row in rows(tmp_path)] == [1, 2]


def test_a_folder_that_another_run_writes_into_is_refused(run, fails, tmp_path):
    part = tmp_path / '.checkpoint-00000005.pt.part'
    part.touch()  # as if the other run were writing it
    with in_use(tmp_path):
        for options in ((), ('--resume',)):
            message = fails(*SMALL, *options, '--epochs', 1, '--output', tmp_path)
            assert message.startswith(f'train.py: error: another process is writing into {tmp_path}: wait')
    assert sorted(path.name for path in tmp_path.iterdir()) == [part.name, '.lock']
    assert run(*SMALL, '--epochs', 1, '--output', tmp_path)[2] == 0
    assert not part.exists()


def test_a_run_that_ended_while_another_began_is_not_overwritten(fails, monkeypatch, tmp_path):
    def lock(folder):
        (folder / 'checkpoint-00000005.pt').touch()
        return lock_folder(folder)

    monkeypatch.setattr('vmamba.tools.training.run.lock_folder', lock)
    assert 'holds a run already: --resume continues it' in fails(*SMALL, '--epochs', 1, '--output', tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint(run, fails, tmp_path):
    args = *SMALL, '--output', tmp_path, '--resume'
    with full_disk(500):
        assert f'cannot write {tmp_path}/config.yaml: File too large' in fails(*args)
    assert not list(tmp_path.glob('*config.yaml*'))
    run(*args, '--epochs', 1)
    before = {path: path.read_bytes() for path in tmp_path.glob('*.pt')}
    with full_disk(1_000_000):
        message = fails(*args)
    assert 'cannot write' in message and ': File too large; what was saved before is intact' in message
    assert {path: path.read_bytes() for path in tmp_path.glob('*.pt')} == before
    assert not list(tmp_path.glob('.*.part'))
    (tmp_path / '.checkpoint-00000009.pt.part').write_bytes(b'of a run that was killed')
    assert run(*args)[2] == 0
    assert not list(tmp_path.glob('.*.part'))


@pytest.mark.parametrize(
    'writer, name',
    [
        ('matplotlib.figure.Figure.savefig', 'curves.png'),
        ('torch.utils.tensorboard.SummaryWriter.add_scalar', 'tensorboard/epoch'),
        ('torch.utils.tensorboard.SummaryWriter.close', 'tensorboard/update'),
    ],
)
def test_a_full_disk_names_the_record(fails, monkeypatch, tmp_path, writer, name):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, fail)
    message = fails(*SMALL, '--epochs', 1, '--output', tmp_path)
    assert f'cannot write {tmp_path}/{name}: No space left on device' in message
    assert not list(tmp_path.glob('.*.part'))


def test_a_loss_that_is_not_finite_ends_the_run(fails, tmp_path):
    diverging = *SMALL, '--lr', '1e30', '--warmup-epochs', 0, '--clip-grad', 'null', '--checkpoint-every', 1
    message = fails(*diverging, '--output', tmp_path)
    assert 'is not a finite number at or before update' in message
    assert message.endswith('; lower lr, set clip_grad')  # it is fp32 already
    assert f'the last good checkpoint is {tmp_path}/checkpoint-0000000' in message
    state = newest(tmp_path)
    assert all(value.isfinite().all() for value in state['state_dict'].values())


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_stop_a_run_or_are_counted(run, fails, tmp_path, workers):
    data = image_folder(tmp_path / 'data')
    broken = data / 'train/cat/2.png', data / 'train/dog/4.png', data / 'validation/dog/1.png'
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    args = *SMALL, '--data', '', '--data-dir', data, '--batch-size', 4, '--epochs', 1, '--workers', workers
    message = fails(*args, '--output', tmp_path / 'a')
    assert any(str(path) in message for path in broken[:2])
    assert 'cannot read the image' in message and '--skip-bad-images' in message
    out, err, status = run(*args, '--output', tmp_path / 'b', '--skip-bad-images')
    assert status == 0
    assert 'skipped 2 unreadable image(s): cat/2.png, dog/4.png' in err
    assert 'skipped 1 unreadable image(s): dog/1.png' in err
    for path in (data / 'train').rglob('*.png'):
        path.write_bytes(b'')
    assert 'none of the 12 images can be read' in fails(*args, '--output', tmp_path / 'c', '--skip-bad-images')


def test_folders_that_do_not_fit(fails, tmp_path):
    def message(folder):
        return fails(*SMALL, '--data', '', '--data-dir', folder, '--batch-size', 2, '--output', tmp_path / 'run')

    empty = image_folder(tmp_path / 'empty')
    (empty / 'train/emu').mkdir()
    assert f'without an image: {empty}/train/emu' in message(empty)
    other = image_folder(tmp_path / 'other')
    (other / 'validation/dog').rename(other / 'validation/emu')
    assert 'different classes: dog, emu' in message(other)
    flat = image_folder(tmp_path / 'flat') / 'train'
    (flat / 'cat/0.png').rename(flat / '0.png')
    assert f'{flat}/0.png is in no class folder: expected {flat}/CLASS/IMAGE' in message(flat)
    assert 'there is no folder' in message(tmp_path / 'nowhere')
    (tmp_path / 'bare').mkdir()
    assert "has no 'train'; it has nothing" in message(tmp_path / 'bare')


def test_nothing_is_validated_on_what_it_is_trained_on(run, fails, tmp_path):
    data = image_folder(tmp_path / 'data')
    args = *SMALL, '--data', '', '--data-dir', data, '--batch-size', 4, '--epochs', 1, '--output', tmp_path / 'run'
    wrong = fails(*args, '--train-split', 'trian')
    assert "has no 'trian'; it has train, validation: --train-split names the folder in it; did you mean train" in wrong
    (data / 'validation').rename(data / 'test')
    assert "has no 'validation'; it has test, train: --val-split names" in fails(*args)
    assert f'{data}/train/cat/0.png is in no class folder' in fails(*args, '--val-split', 'train/cat')
    assert run(*args, '--val-split', 'test')[2] == 0
    (data / 'test').rename(data / 'val')
    assert run(*args, '--output', tmp_path / 'synonym')[2] == 0


def test_links_do_not_bring_images_of_training_into_the_validation(run, fails, tmp_path):
    data = image_folder(tmp_path / 'data')
    args = *SMALL, '--data', '', '--data-dir', data, '--batch-size', 4, '--epochs', 1

    def shared(number, path):
        message = fails(*args, '--output', tmp_path / f'run{number}', '--data', '' if number % 2 else 'torch/folder')
        assert f'must not be trained on: {data} has {path}' in message

    (data / 'validation/z').symlink_to(data / 'train')
    shared(0, data / 'train/cat')
    (data / 'validation/z').unlink()
    (data / 'train/dog/up').symlink_to(data / 'validation/dog')
    shared(1, data / 'validation/dog')
    (data / 'train/dog/up').unlink()
    linked = data / 'train/dog/9.png'
    linked.symlink_to(data / 'validation/dog/5.png')
    shared(2, data / 'validation/dog/5.png')
    linked.unlink()
    for split in ('train', 'validation'):
        (data / split / 'cat/9.png').symlink_to(tmp_path / 'pool.png')
    shared(3, tmp_path / 'pool.png')
    (data / 'train/cat/9.png').unlink()
    shutil.copy(data / 'train/cat/0.png', tmp_path / 'pool.png')
    (data / 'train/dog').rename(tmp_path / 'dogs')
    (data / 'train/dog').symlink_to(tmp_path / 'dogs')
    for split in ('train', 'validation'):
        (data / split / 'cat/up').symlink_to('..')
    out, err, status = run(*args, '--output', tmp_path / 'run')
    assert status == 0, err
    assert newest(tmp_path / 'run')['data'] == {'images': 12, 'validation images': 13, 'classes': ['cat', 'dog']}


def test_other_data_does_not_continue_a_run(run, fails, tmp_path):
    data = image_folder(tmp_path / 'data')
    args = *SMALL, '--data', '', '--data-dir', data, '--batch-size', 4, '--output', tmp_path / 'run', '--resume'
    assert run(*args, '--epochs', 1)[2] == 0
    best = torch.load(tmp_path / 'run/best.pt', weights_only=True)
    assert best['config']['class_names'] == ['cat', 'dog']
    for split in ('train', 'validation'):
        (data / split / 'dog').rename(data / split / 'cow')
    assert 'is of a run with other classes: now without dog and with cow; give the data' in fails(*args)
    (data / 'train/cat/0.png').unlink()
    assert 'is of a run with images 12, now 11; give what it had' in fails(*args)


@pytest.mark.parametrize(
    'options, expected',
    [
        (['--weight-dekay', '0.1'], "unknown option '--weight-dekay'; did you mean --weight-decay"),
        (['--lr', 'fast'], "lr must be of type float, the command line gives 'fast'"),
        (['--precision', 'fp8'], "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        (['--model', 'vmamba_nan'], "there is no model 'vmamba_nan'; did you mean vmamba_nano or vmamba_"),
        (['--opt', 'adamv'], "there is no optimizer 'adamv'; did you mean adam"),
        (['--opt', 'lookahead_adamv'], "there is no optimizer 'lookahead_adamv'"),
        (['--opt-args', '{beta: [0.9, 0.95]}'], "unexpected keyword argument 'beta'; did you mean betas?"),
        (['--opt-args', '{betas: [0.9, 2.0]}'], 'do not fit adamw: Invalid beta parameter at index 1: 2.0'),
        (['--sched', 'cosin'], "got 'cosin'; did you mean cosine?"),
        (['--interpolation', 'bicubik'], "got 'bicubik'; did you mean bicubic?"),
        (['--auto-augment', 'rnd-m9'], "auto_augment 'rnd-m9' is none of timm's policies"),
        (['--lr', '-1'], 'lr must be above 0, got -1'),
        (['--lr', '.inf'], 'lr must be above 0, got inf'),
        (['--workers', '-1'], 'workers must be at least 0, got -1'),
        (['--img-size', '-3'], 'img_size must be at least 1, got -3'),
        (['--drop-path', '1.5'], 'drop_path must be at least 0 and below 1, got 1.5'),
        (['--crop-pct', '0'], 'crop_pct must be above 0 and at most 1, got 0'),
        (['--scale', '[1.0, 0.5]'], 'scale must be two numbers, the lower first, got [1.0, 0.5]'),
        (['--warmup-epochs', '2'], 'warmup_epochs 2 must be below epochs 2'),
        (['--data', 'hfd/foo'], 'is neither a folder nor a CSV file, nor one of packaged/...'),
        (['--data', 'synthetik'], 'did you mean synthetic?'),
        (['--val-split', 'train'], "train_split and val_split are both 'train'"),
        (['--train-split', 'all'], "'all' and 'validation' of packaged/lfw share images; choose train and validation"),
        (['--val-split', 'search'], "'train' and 'search' of packaged/lfw share images"),
        (['--cache', '--auto-augment', 'original'], 'cache allows neither skip_bad_images nor auto_augment nor'),
        (['--data', 'packaged/mnist'], 'there are packaged/mnist5k, packaged/digits, packaged/lfw'),
        (['--train-split', 'test'], "packaged/lfw has no split 'test', only train, validation, all"),
        (['--data', ''], 'no data: give --data FOLDER, --data FILE.csv'),
        (['--num-classes', '1'], 'the data has 2 classes, num_classes is 1'),
        (['--mixup', '0.8'], 'need whole batches: set drop_last'),
        (['--mixup', '0.8', '--drop-last', '--batch-size', '3'], 'batch_size must be even, got 3'),
        (['--batch-size', '0'], 'batch_size must be at least 1, got 0'),
        (['--batch-size', '500', '--drop-last'], 'one update takes 500 images, but an epoch has fewer'),
        (['--pretrained'], 'the published weights of test_vit have 1000 classes, the data 2; --new-head'),
        (
            ['--pretrained', '--model', 'vmamba_nano'],
            'has no published weights: give --checkpoint FILE, or --from-scratch',
        ),
        (['--teacher', 'test_vit'], 'test_vit have 1000 classes, the data 2; give --teacher-checkpoint FILE'),
        (['--teacher', 'test_vitt'], "there is no teacher 'test_vitt'; did you mean test_vit"),
        (['--teacher', 'vim_nano'], 'vim_nano has no published weights: give --teacher-checkpoint FILE'),
        (['--checkpoint', 'nothing.pt'], 'cannot build test_vit'),
        (['--model-args', '{a: 1, a: 2}'], "'{a: 1, a: 2}' is not valid YAML: the key 'a' is there twice"),
        (['--model-args', '{dept: 3}'], "unexpected keyword argument 'dept'; did you mean depth"),
        (['--ema-warmup'], 'there is none: set ema_decay'),
        (['--shard'], 'shard distributes the weights over processes: start several by torchrun'),
        (['--shard', '--clip-grad', '1', '--clip-mode', 'agc'], 'clip_mode agc takes norms of whole rows'),
        (['--device', 'tpu'], "cannot run on device 'tpu'"),
    ],
)
def test_wrong_options_are_one_line(fails, tmp_path, options, expected):
    assert expected in fails(*SMALL, '--output', tmp_path, *options)


def test_wrong_configurations_are_one_line(fails, tmp_path):
    path = tmp_path / 'config.yaml'

    def message(text):
        path.write_text(text)
        return fails(path)

    assert f"{path} has an unknown key 'weight_dekay'; did you mean weight_decay?" in message('weight_dekay: 0.1')
    assert 'is not valid YAML' in message('lr: [')
    assert 'must hold keys and values' in message('- lr')
    assert 'builds on itself' in message('_base_: config.yaml')
    assert 'names no model' in message('lr: 0.1')
    assert 'there is no configuration' in message('_base_: nothing.yaml')
    assert '_base_ must name a file, got 3' in message('_base_: 3')
    assert f"{path} is not valid YAML: the key 'lr' is there twice in line 3" in message('lr: 1\nseed: 1\nlr: 2')
    assert "the key 'depths' is there twice in line 2" in message('model_args:\n  {depths: 1, img_size: 2, depths: 3}')
    assert 'is not valid YAML: month must be in 1..12' in message('lr: 2020-99-01')
    path.write_bytes('# caf\xe9\nmodel: vmamba_t'.encode('latin-1'))
    assert f'{path} is not UTF-8 text: invalid continuation byte at byte 5' in fails(path)
    path.write_text('_base_: other.yaml')
    (tmp_path / 'other.yaml').write_bytes(b'\xff\xfe')
    assert f'{tmp_path}/other.yaml is not UTF-8 text' in fails(path)


def test_a_yaml_mapping_may_replace_keys_that_it_merges():
    from vmamba.tools.training.config import parse_yaml

    assert parse_yaml('a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [1, 1]')['b'] == {'x': 3, 'y': 2}


def test_numbers_that_no_run_has_a_use_for_are_refused_and_null_takes_a_text_back():
    from vmamba.tools.training.config import load_config

    path = ROOT / CONFIGS / 'vim_t.yaml'
    wrong = dict(ema_decay=[1.5, 1, -1], clip_grad=[0], mixup=[-1], weight_decay=[-1], val_batch_size=[0], reprob=[1.1])
    wrong.update(ratio=[[0.0, 1.0]], seed=[-1], checkpoint_every=[-5], layer_decay=[0])
    for key, value in ((key, value) for key, values in wrong.items() for value in values):
        with pytest.raises(UserError, match=f'^{key} must be '):
            load_config(path, {key: value})
    _, _, values = train.parse_args([str(path), '--auto-augment', 'null', '--teacher', 'null', '--checkpoint', 'a.pt'])
    config = load_config(path, values)
    assert (config.auto_augment, config.teacher, config.checkpoint) == (None, None, 'a.pt')


def test_the_terminal_gets_a_bar_and_grey_images_one_channel(run, monkeypatch, tmp_path):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TERM', 'xterm')
    out, _, _ = run(*SMALL, '--output', tmp_path, '--log-every', 1, '--in-chans', 1)
    assert 'epoch 2/2' in out and 'epoch 2 update' not in out
    kept = torch.load(tmp_path / 'best.pt', weights_only=True)['config']
    assert (kept['in_chans'], kept['mean'], kept['std'], kept['img_size']) == (1, [0.5], [0.5], 32)
    assert {'model', 'model_args', 'num_classes', 'crop_pct', 'crop_mode', 'interpolation', 'class_names'} < kept.keys()
    assert {value.shape[1] for value in newest(tmp_path)['state_dict'].values() if value.shape[2:] == (16, 16)} == {1}


def test_every_model_has_a_configuration_that_fits(monkeypatch):
    from timm import create_model, list_models

    from vmamba.tools.training.config import load_config

    configs = {path.stem: load_config(path, {}) for path in (ROOT / CONFIGS).glob('[!_]*.yaml')}
    ours = set(list_models(module=['adventurer', 'mambavision', 'vim', 'vmamba', 'vssd']))
    pretrained_longer = {'mambavision_l3', 'adventurer_b_patch8'}  # on ImageNet-21K, and at 16-pixel patches
    assert ours - pretrained_longer <= {config.model for config in configs.values()}
    for name, config in configs.items():
        if name in ours:
            assert config.model == name
            assert config.drop_path is not None
            assert config.warmup_prefix is name.startswith(('vmamba', 'vssd'))
        args = {'drop_path_rate': config.drop_path} if config.drop_path is not None else {}
        create_model(config.model, **args, **config.model_args, device='meta')


def test_the_commands_of_the_page_are_commands(monkeypatch):
    from vmamba.tools.training.config import load_config

    monkeypatch.chdir(ROOT)
    page = (ROOT / 'docs/training.md').read_text()
    commands = re.findall(r'^(?:torchrun .*-m vmamba.tools.train|vmamba train) (.*)$', page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        path, _, values = train.parse_args(shlex.split(command))
        load_config(path, values)


def test_compiled_training_goes_on_and_leaves_ordinary_weights(run, monkeypatch, tmp_path):
    # The graphs are captured and differentiated as ever; only the C++ compiler, which takes minutes, is left out.
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model, **_: compiled.append(model) or captured(model))
    captured = functools.partial(torch_compile, backend='aot_eager')
    args = *SMALL, '--model', 'vim_nano', '--model-args', '{depth: 1, embed_dim: 16}', '--batch-size', 40
    for name, options in (('eager', ()), ('compiled', ('--compile', '--ema-decay', 0.9))):
        assert run(*args, *options, '--output', tmp_path / name)[2] == 0
    assert [type(model).__name__ for model in compiled] == ['Vim']
    max((tmp_path / 'compiled').glob('checkpoint-*.pt')).unlink()
    before = rows(tmp_path / 'compiled')
    out, err, _ = run(*args, '--compile', '--ema-decay', 0.9, '--resume', '--output', tmp_path / 'compiled')
    assert 'epoch 2, update 4' in out, err
    assert rows(tmp_path / 'compiled') == before
    ours, theirs = newest(tmp_path / 'compiled'), newest(tmp_path / 'eager')
    for key in ('state_dict', 'state_dict_ema'):
        assert ours[key].keys() == theirs['state_dict'].keys()
    for name, value in ours['state_dict'].items():
        assert torch.allclose(value, theirs['state_dict'][name], rtol=1e-3, atol=1e-4), name
