import csv
import json
import shutil

import numpy as np
import pytest
from folders import full_disk, write_digits, write_photographs

from vmamba.tools import evaluate_features, extract_features
from vmamba.tools.features.store import check_comparable


@pytest.fixture(scope='module')
def features(tmp_path_factory):
    """Pooled features and maps of 120 digits to learn from and 60 others."""
    folder = tmp_path_factory.mktemp('features')
    options = ['--model', 'vmamba_nano=untrained', '--features', 'pooled', 'stages.0', '--workers', '0']
    for name, count, start in (('train', 12, 0), ('test', 6, 12)):
        images = write_digits(folder / f'images_{name}', count, start=start)
        extract_features.main([str(images), *options, '--output', str(folder / name), '--device', 'cpu'])
    return folder


def run(*arguments):
    evaluate_features.main([str(argument) for argument in arguments])


def read(path):
    return list(csv.DictReader(path.open()))


def test_held_out_images(features, tmp_path, capsys):
    common = features / 'train', '--test', features / 'test', '--output', tmp_path / 'new' / 'e.csv'
    run(*common, '--neighbours', 5, '--C', 0.1, 1)
    rows = read(tmp_path / 'new' / 'e.csv')
    assert [(row['feature'], row['classifier']) for row in rows] == [
        (feature, classifier) for feature in ('pooled', 'stages.0') for classifier in ('5-NN', 'linear probe')
    ]
    for row in rows:
        assert (row['train_images'], row['test_images'], row['classes'], row['spread']) == ('120', '60', '10', '')
        assert float(row['accuracy']) > 30  # chance is 10; the weights are random
    assert 'linear probe' in capsys.readouterr().out


def test_cross_validation(features, capsys):
    run(features / 'train', '--features', 'pooled', '--folds', 3, '--neighbours', 5)
    rows = read(features / 'train' / 'evaluation.csv')
    assert [(row['folds'], row['dim']) for row in rows] == [('3', '256')] * 2
    printed = capsys.readouterr().out
    assert 'spread' in printed and f'{float(rows[1]["accuracy"]):.2f}' in printed


def test_a_full_disk_is_one_line_with_the_file(features, tmp_path, capsys):
    with full_disk(20), pytest.raises(SystemExit) as error:
        run(features / 'train', '--features', 'pooled', '--folds', 3, '--output', tmp_path / 'e.csv')
    assert error.value.code == 2
    assert f'cannot write {tmp_path}/e.csv: File too large' in capsys.readouterr().err


def test_images_without_features_are_counted(features, tmp_path, capsys):
    shutil.copytree(features / 'train', tmp_path / 'killed')
    progress = np.load(tmp_path / 'killed' / 'progress.npy')
    progress[-3:] = 0, 0, 2  # the index still says that all are done
    np.save(tmp_path / 'killed' / 'progress.npy', progress)
    run(tmp_path / 'killed', '--features', 'pooled', '--folds', 3, '--neighbours', 5)
    assert '3 of 120 images left out: 2 todo, 1 unreadable' in capsys.readouterr().out
    assert {row['train_images'] for row in read(tmp_path / 'killed' / 'evaluation.csv')} == {'117'}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['absent'], 'absent holds no features (no index.csv)'),
        (['train', '--features', 'stages.1'], "no feature 'stages.1'; it has pooled, stages.0"),
        (['train', '--folds', '13'], "class '0' has 12 images, fewer than the 13 folds"),
        (['train', '--neighbours', '97'], '--neighbours 97 is more than the 96 images'),
    ],
)
def test_failures_are_one_line(features, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(features)
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count('\n') == 1


def test_features_of_other_weights_are_no_test(features, tmp_path, capsys):
    shutil.copytree(features / 'test', tmp_path / 'other')
    settings = json.loads((tmp_path / 'other' / 'settings.json').read_text())
    settings.update(model='vmamba_nano=a.pth', weights_sha256='abc', seed=None, mean=[0, 0, 0], precision='bf16')
    (tmp_path / 'other' / 'settings.json').write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        run(features / 'train', '--test', tmp_path / 'other')
    message = capsys.readouterr().err
    assert "other differ in mean [0.485, 0.456, 0.406] and [0, 0, 0], model 'vmamba_nano=untrained' and" in message
    assert "weights_sha256 None and 'abc': extract both alike" in message and 'precision' not in message
    check_comparable(tmp_path / 'other', tmp_path / 'other')


@pytest.mark.parametrize(
    'option, value, message',
    [
        ('--C', '-1', "must be a number above 0, got '-1'"),
        ('--folds', '1', "must be a whole number above 1, got '1'"),
        ('--fold', '3', "unknown option '--fold'; did you mean --folds?"),
    ],
)
def test_wrong_options_are_named(capsys, option, value, message):
    with pytest.raises(SystemExit) as error:
        run('train', option, value)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_images_without_class_folders(tmp_path, capsys):
    write_photographs(tmp_path / 'images')
    options = ['--model', 'vmamba_nano=untrained', '--output', str(tmp_path / 'f'), '--workers', '0', '--device', 'cpu']
    extract_features.main([str(tmp_path / 'images'), *options])
    with pytest.raises(SystemExit):
        run(tmp_path / 'f')
    assert 'astronaut.png lies in no class folder' in capsys.readouterr().err
