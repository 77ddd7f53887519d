"""Own images: folders without splits and CSV files, from fine-tuning to the model that it leaves."""

import csv
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from training_runs import image_folder, newest, signals_kept

import vmamba
from vmamba.tools import extract_features, predict, train, validate
from vmamba.tools.training.config import Config, load_config
from vmamba.tools.training.splits import load_datasets
from vmamba.tools.user_errors import UserError


@pytest.fixture
def photos(tmp_path):
    """20 images in class folders, without splits."""
    return image_folder(tmp_path / 'data', count=10) / 'train'


def splits_of(path, **settings):
    """Paths in each split, relative to the data's folder."""
    parts = load_datasets(Config(data_dir=str(path), **settings))
    return [[part.filename(i) for i in range(len(part))] for part in parts]


def write_csv(path, rows, header='path,label'):
    path.write_text('\n'.join([header, *rows]) + '\n')
    return path


def test_a_folder_without_splits_is_split_by_class(photos):
    train, validation = splits_of(photos)
    assert not set(train) & set(validation) and len(train) + len(validation) == 20
    assert [sum(name.startswith(label) for name in validation) for label in ('cat', 'dog')] == [2, 2]
    assert splits_of(photos) == [train, validation]
    assert splits_of(photos, seed=1)[1] != validation
    assert len(splits_of(photos, val_fraction=0.5)[1]) == 10
    assert len(splits_of(photos, val_fraction=0.01)[1]) == 2  # at least one of each class


def test_the_split_of_a_file_does_not_depend_on_the_others(photos):
    _, before = splits_of(photos)
    (photos / before[0]).unlink()
    _, after = splits_of(photos)
    assert set(before[1:]) <= set(after)


def test_links_to_one_file_stay_in_one_split(photos):
    _, validation = splits_of(photos)
    for number in range(40):  # some of which would be validated on
        (photos / f'cat/link{number}.png').symlink_to(photos / validation[0])
    train, validation = splits_of(photos)
    real = [{os.path.realpath(photos / name) for name in part} for part in (train, validation)]
    assert not real[0] & real[1]


def test_a_training_split_alone_is_split_on_request(photos):
    shutil.rmtree(photos.parent / 'validation')
    with pytest.raises(UserError, match="has no 'validation'; it has train"):
        splits_of(photos.parent)
    assert [len(part) for part in splits_of(photos.parent, val_fraction=0.2)] == [16, 4]


def test_a_csv_file_names_images_and_labels(photos, tmp_path):
    rows = [
        f'data/train/{name}/{number}.png,{label}' for name, label in (('cat', 2), ('dog', 10)) for number in range(5)
    ]
    path = write_csv(tmp_path / 'labels.csv', rows)
    parts = load_datasets(Config(data_dir=str(path)))
    assert [len(part) for part in parts] == [8, 2]
    assert parts[0].reader.class_to_idx == {'2': 0, '10': 1}
    split = [f'{row},{part}' for row, part in zip(rows, ['train'] * 3 + ['val', 'test'] + ['train'] * 3 + ['val'] * 2)]
    write_csv(path, split, 'path,label,split')
    train, validation = splits_of(path)
    assert train == [row.partition(',')[0] for row in rows[:3] + rows[5:8]]
    assert validation == [row.partition(',')[0] for row in rows[3:4] + rows[8:]]
    with pytest.raises(UserError, match='has a validation split already: leave val_fraction out'):
        splits_of(path, val_fraction=0.2)


@pytest.mark.parametrize(
    'rows, header, message',
    [
        (['a.png,cat'], 'file,label', 'must begin with the header path,label; its columns are file, label'),
        (['nowhere.png,cat'], 'path,label', r'lists 1 files that do not exist: .*nowhere.png'),
        (['data/train/cat/0.png,'], 'path,label', 'line 2: the path or the label is empty'),
        (['data/train/cat/0.png,cat,dev'], 'path,label,split', "line 2: split 'dev' is not train, val or test"),
        ([], 'path,label', 'lists no images'),
        (['data/train/cat/0.png,cat', 'data/train/dog/0.png,dog'], 'path,label', 'has no class of two images'),
        (
            ['data/train/cat/0.png,cat,train', 'data/train/cat/0.png,cat,val'],
            'path,label,split',
            r'must not be trained on: .*labels.csv has .*0.png in both splits',
        ),
    ],
)
def test_wrong_csv_files_are_named(photos, tmp_path, rows, header, message):
    with pytest.raises(UserError, match=message):
        splits_of(write_csv(tmp_path / 'labels.csv', rows, header))


def test_data_may_be_a_path_and_a_checkpoint_replaces_published_weights(photos):
    config = load_config(Path('finetune'), {'data': str(photos), 'checkpoint': 'best.pt'})
    assert (config.data, config.data_dir, config.pretrained) == ('', str(photos), False)
    assert load_config(Path('finetune'), {}).pretrained
    with pytest.raises(UserError, match='both name the data; leave one out'):
        load_config(Path('finetune'), {'data': str(photos), 'data_dir': 'images'})
    with pytest.raises(UserError, match='val_fraction must be above 0 and below 1, got 1'):
        load_config(Path('finetune'), {'val_fraction': 1})


def test_packages_of_named_data_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='hfds/beans needs the package datasets: pip install datasets'):
        load_datasets(Config(data='hfds/beans'))
    with pytest.raises(UserError, match='val_fraction is for a folder or a CSV file, not for hfds/beans'):
        load_datasets(Config(data='hfds/beans', val_fraction=0.2))


def test_published_weights_that_cannot_be_downloaded_are_one_line(photos, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('vmamba.models._pretrained.build_model_with_cfg', fail)
    with pytest.raises(SystemExit):
        train.main(['finetune', '--data', str(photos), '--output', str(tmp_path / 'run'), '--device', 'cpu'])
    error = capsys.readouterr().err.strip()
    assert error.count('\n') == 0
    assert 'cannot download the published weights of vmamba_t (no network); give --checkpoint FILE' in error
    assert '--from-scratch for random weights' in error


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """The folder of a run that fine-tuned a small model from random weights, with a moving average."""
    folder = tmp_path_factory.mktemp('tuned')
    photos = image_folder(folder / 'data', count=10) / 'train'
    args = 'finetune', '--model', 'vim_nano', '--from-scratch', '--data', photos, '--output', folder / 'run'
    small = '--model-args', '{depth: 2, embed_dim: 32}', '--img-size', 48, '--epochs', 3, '--warmup-epochs', 1
    with signals_kept():
        train.main([str(arg) for arg in (*args, *small, '--workers', 0, '--device', 'cpu', '--batch-size', 8)])
    return folder / 'run'


def test_a_run_is_loaded_with_its_arguments_size_and_classes(tuned):
    best = torch.load(tuned / 'best.pt', weights_only=True)
    for path, state in ((tuned / 'best.pt', best['state_dict']), (max(tuned.glob('ch*.pt')), None)):
        model = vmamba.load(path)
        state = state or newest(tuned)['state_dict_ema']
        assert not model.training and model.class_names == ['cat', 'dog'] and len(model.blocks) == 2
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        config = timm.data.resolve_data_config(model=model)
        assert config['input_size'] == (3, 48, 48) and config['crop_pct'] == best['config']['crop_pct']
        assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    assert vmamba.load(tuned / 'best.pt', num_classes=0)(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    args = dict(num_classes=2, img_size=48, depth=2, embed_dim=32)
    ours, theirs = (
        vmamba.load(tuned / 'best.pt'),
        timm.create_model('vim_nano', checkpoint_path=tuned / 'best.pt', **args),
    )
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(ours(images), theirs.eval()(images))


def test_files_of_other_programs_are_not_loaded(tmp_path):
    torch.save(timm.create_model('vim_nano', depth=1).state_dict(), tmp_path / 'weights.pt')
    with pytest.raises(ValueError, match=r'does not say which model it is of.*use timm.create_model\(NAME'):
        vmamba.load(tmp_path / 'weights.pt')
    with pytest.raises(FileNotFoundError, match='there is no checkpoint file'):
        vmamba.load(tmp_path / 'absent.pt')
    (tmp_path / 'broken.pt').write_bytes(b'PK')
    with pytest.raises(RuntimeError, match='is not a readable checkpoint'):
        vmamba.load(tmp_path / 'broken.pt')


def test_predictions_name_the_classes_of_the_run(tuned, capsys):
    config = yaml.safe_load((tuned / 'config.yaml').read_text())
    image = Path(config['data_dir']) / 'dog/3.png'
    predict.main([str(image), '--checkpoint', str(tuned / 'best.pt'), '--workers', '0', '--device', 'cpu'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and sorted(line.split()[-1] for line in lines[1:]) == ['cat', 'dog']


def test_the_other_tools_take_the_file_of_a_run(tuned, tmp_path, capsys):
    options = '--checkpoint', tuned / 'best.pt', '--workers', '0', '--device', 'cpu', '--output'
    photos = Path(yaml.safe_load((tuned / 'config.yaml').read_text())['data_dir'])
    validate.main([str(arg) for arg in (photos, *options, tmp_path / 'validate')])
    assert 'vim_nano,' in (tmp_path / 'validate/validate.csv').read_text()
    extract_features.main([str(arg) for arg in (photos, *options, tmp_path / 'features')])
    assert np.load(tmp_path / 'features/pooled.npy').shape == (20, 32)
    dogs = tmp_path / 'dogs'
    shutil.copytree(photos / 'dog', dogs / 'dog')  # the second class, which here is the only one
    scores = []
    for name in ('dog', 'cat'):
        (dogs / 'dog').rename(dogs / name)
        validate.main([str(arg) for arg in (dogs, *options, tmp_path / name)])
        (row,) = csv.DictReader((tmp_path / name / 'validate.csv').open())
        scores.append(float(row['top1']))
        (dogs / name).rename(dogs / 'dog')
    assert sum(scores) == pytest.approx(100)
    (dogs / 'dog').rename(dogs / 'cow')
    with pytest.raises(SystemExit):
        validate.main([str(arg) for arg in (dogs, *options, tmp_path / 'cows')])
    assert "has none of the model's 2 classes for the folders cow" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        validate.main([str(photos)])
    assert 'no model: give --models NAME[=FILE], or --checkpoint FILE' in capsys.readouterr().err


class FakeWandb:
    """What the run uses of the package wandb."""

    def __init__(self):
        self.started, self.logged, self.finished, self.metrics = [], [], 0, {}
        self.id = 'abc'

    def init(self, **kwargs):
        self.started.append(kwargs)
        return self

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_metrics_go_to_wandb_only_if_asked_for(photos, tmp_path, monkeypatch, capsys):
    args = 'finetune', '--model', 'test_vit', '--from-scratch', '--data', photos, '--output', tmp_path / 'run'
    args = (
        *args,
        '--img-size',
        32,
        '--workers',
        0,
        '--device',
        'cpu',
        '--warmup-epochs',
        0,
        '--log-every',
        1,
        '--resume',
    )

    def run(*options):
        with signals_kept():
            train.main([str(arg) for arg in (*args, '--resume', *options)])

    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit):
        run('--epochs', 1, '--log', 'tensorboard', 'wandb')
    assert 'log wandb needs the package wandb: pip install wandb; or leave it out of --log' in capsys.readouterr().err
    run('--epochs', 1, '--log')
    assert not (tmp_path / 'run/tensorboard').exists()
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    for epochs in (2, 3):
        run('--epochs', epochs, '--log', 'wandb')
    first, second = wandb.started
    assert first['project'] == 'vmamba' and first['config']['model'] == 'test_vit' and first['id'] is None
    assert (second['id'], second['resume'], wandb.finished) == ('abc', 'allow', 2)
    assert wandb.metrics == {'update/*': 'update/step', 'epoch/*': 'epoch/step'}
    assert [row['epoch/step'] for row in wandb.logged if 'epoch/step' in row] == [2, 3]
    assert all(row['update/loss'] > 0 for row in wandb.logged if 'update/step' in row)
    assert not (tmp_path / 'run/tensorboard').exists()
