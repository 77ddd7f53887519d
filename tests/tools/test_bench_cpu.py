import csv

import pytest
import torch
from vmamba.tools import bench_cpu


@pytest.fixture
def tiny(monkeypatch):
    """Nano models in the place of the real ones, and no change of this process's threads."""
    monkeypatch.setattr(bench_cpu, 'SIZE', 32)
    for name in ('SWIN', 'DEIT'):
        monkeypatch.setattr(bench_cpu, name, 'vmamba_nano')
    create_model = bench_cpu.timm.create_model
    nano = {'vmamba_t': 'vmamba_nano', 'vim_t': 'vmamba_nano'}
    monkeypatch.setattr(bench_cpu.timm, 'create_model', lambda name: create_model(nano.get(name, name)))
    ratios = tuple(ratio._replace(baseline='vmamba_nano') for ratio in bench_cpu.RATIOS)
    monkeypatch.setattr(bench_cpu, 'RATIOS', ratios)


def test_medians_and_ratios_are_written(tiny, tmp_path):
    output = tmp_path / 'bench.csv'
    bench_cpu.main(['--repeats', '1', '--threads', str(torch.get_num_threads()), '--output', str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [row['kind'] for row in rows].count('ratio') == len(bench_cpu.RATIOS) == 3
    medians = {(row['work'], row['name']): float(row['value']) for row in rows if row['kind'] == 'median_ms'}
    for row in rows[-3:]:
        model, baseline = row['name'].split('/')
        expected = medians[row['work'], model] / medians[row['work'], baseline]
        assert float(row['value']) == pytest.approx(expected)
    assert all(row['torch'] == torch.__version__ and row['device'] for row in rows)


def test_ratio_of_medians():
    medians = {
        bench_cpu.INFERENCE: {'vmamba_t': 3.0, 'vim_t': 6.0, bench_cpu.SWIN: 2.0, bench_cpu.DEIT: 1.0},
        bench_cpu.TRAINING: {'vmamba_t': 8.0, bench_cpu.SWIN: 4.0},
    }
    assert list(bench_cpu.ratios(medians).values()) == [1.5, 2.0, 6.0]
