import pytest
import torch

from vmamba.tools import demo
from vmamba.tools.images import packaged_data


def test_the_demo_trains_and_fails_below_the_required_accuracy(monkeypatch, tmp_path):
    arrays = packaged_data.DATASETS['mnist5k']()
    few = packaged_data.Arrays(arrays.images[::50], arrays.labels[::50], arrays.classes)
    monkeypatch.setitem(packaged_data.DATASETS, 'mnist5k', lambda: few)
    monkeypatch.setattr(demo, 'CONFIGS', ['mnist5k_vmamba_nano'])
    with pytest.raises(SystemExit, match='held-out accuracy below 90 %: vmamba_nano'):
        demo.main(['--device', 'cpu', '--skip-comparison', '--epochs', '2', '--output', str(tmp_path)])
    assert (tmp_path / 'training.png').stat().st_size > 0
    best = torch.load(tmp_path / 'mnist5k_vmamba_nano/best.pt', weights_only=True)
    assert best['config']['in_chans'] == 1 and len(best['config']['class_names']) == 10


def test_the_demo_compares_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'MODELS', ('vmamba_nano',))
    demo.main(['--skip-training', '--small', '--device', 'cpu', '--sizes', '32', '--output', str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['highres.csv', 'highres.png']
