import csv

import pytest
import timm
import torch
from vmamba.tools import demo
from vmamba.tools.images import digits
from vmamba.tools.images.packaged_data import stratified_split

SMALL = {'vmamba_nano': {}, 'vim_nano': {'depth': 2, 'd_state': 2, 'patch_size': 8}}


@pytest.fixture(scope='module')
def data():
    return digits.load_digits()


def test_digits_are_real_padded_and_normalised(data):
    assert data.images.shape == (5000, 1, 32, 32)
    assert data.labels.bincount().tolist() == [500] * 10
    assert abs(data.images.mean()) < 1e-4
    assert abs(data.images.std() - 1) < 1e-4
    assert len(data.images[:, :, :2].unique()) == 1


def test_split_is_stratified_disjoint_and_repeatable(data):
    train, test = stratified_split(data.labels, 0.2, seed=3)
    assert data.labels[train].bincount().tolist() == [400] * 10
    assert data.labels[test].bincount().tolist() == [100] * 10
    assert torch.cat([train, test]).sort().values.tolist() == list(range(5000))
    assert torch.equal(test, stratified_split(data.labels, 0.2, seed=3)[1])
    assert not torch.equal(test, stratified_split(data.labels, 0.2, seed=4)[1])


def test_augmentation_moves_digits_but_keeps_their_background(data):
    images = data.images[:64]
    augmented = digits.augment(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert not torch.allclose(augmented, images)
    assert augmented.min() >= images.min() - 1e-4
    assert augmented.max() <= images.max() + 1e-4


@pytest.mark.parametrize('name', ['vmamba_nano', 'vim_nano'])
def test_a_few_steps_lower_the_loss(data, name):
    part = data.take(torch.arange(0, 5000, 50))
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=1, **SMALL[name])
    reports = []
    history = digits.train(model, part, part, epochs=3, batch_size=20, report=lambda *values: reports.append(values))
    assert [record.epoch for record in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > 0.1
    assert [step for step, *_ in reports] == list(range(1, 16))
    assert all(steps == 15 for _, steps, *_ in reports)


def test_demo_writes_its_training_and_fails_below_the_required_accuracy(monkeypatch, tmp_path, data):
    monkeypatch.setattr(demo, 'load_digits', lambda: data.take(torch.arange(0, 5000, 50)))
    recipes = {'vmamba_nano': demo.load_recipes()['vmamba_nano']}
    monkeypatch.setattr(demo, 'load_recipes', lambda: recipes)
    with pytest.raises(SystemExit, match='held-out accuracy below 97%: vmamba_nano'):
        demo.main(['--epochs', '1', '--device', 'cpu', '--skip-comparison', '--output', str(tmp_path)])
    (row,) = csv.DictReader((tmp_path / 'training.csv').open())
    assert row['model'] == 'vmamba_nano'
    assert row['epoch'] == '1'
    assert (tmp_path / 'training.png').stat().st_size > 0


def test_demo_compares_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'MODELS', ('vmamba_nano',))
    demo.main(['--skip-training', '--device', 'cpu', '--sizes', '32', '--output', str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['highres.csv', 'highres.png']
