"""The tables of docs/scaling.md against sums done by hand."""

from pathlib import Path

import pytest

from vmamba.tools import bench_plan
from vmamba.tools.bench_plan import INFERENCE, TRAINING, Facts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch):
    """A model of a million parameters, and one four times as large with 2.5 times the FLOPs and twice the blocks."""
    facts = {'vmamba_t': Facts(10**6, 10**9, 10, 500), 'vmamba_b': Facts(4 * 10**6, 25 * 10**8, 20, 1000)}
    monkeypatch.setattr(bench_plan, 'facts_of', facts.__getitem__)
    monkeypatch.setattr(bench_plan, 'TRAINED', tuple(facts))
    monkeypatch.setattr(bench_plan, 'STORED', tuple(facts))
    monkeypatch.setattr(bench_plan, 'SMALLER', {'vmamba_b': 'vmamba_t'})
    monkeypatch.setattr(bench_plan, 'INFERENCE', {'vmamba_t': 10_000})
    monkeypatch.setattr(bench_plan, 'TRAINING', {'vmamba_t': 1000})


def rows(table, **keys):
    for key, value in keys.items():
        table = table[table[key] == value]
    return table.to_dict('records')


def test_time_and_data_of_training(small):
    (row,) = rows(bench_plan.training(100), model='`vmamba_b`', GPUs=64)
    assert (row['images per step'], row['images/s'], row['cores']) == (8192, 64 * 400, 256)
    assert row['storage, GB/s'] == pytest.approx(25_600 * 115_440 / 1e9, rel=1e-3)
    assert row['hours, 1K'] == pytest.approx(1_281_167 * 300 / 25_600 / 3600)
    assert row['hours, 22K'] == pytest.approx(14_197_122 * 90 / 25_600 / 3600)
    # 1,024 images take 40 ms of the GPUs, but twice the blocks take the host 61.8 ms.
    assert row['hours, 1K, 1024 per step'] == pytest.approx(1_281_167 * 300 / 1024 * 0.0618 / 3600)
    (row,) = rows(bench_plan.training(100), model='`vmamba_b`', GPUs=8)
    assert row['hours, 1K, 1024 per step'] == pytest.approx(row['hours, 1K'])


def test_all_reduce(small):
    table = bench_plan.communication()
    (one,) = rows(table, model='`vmamba_b`', GPUs=8)
    assert one['sent per GPU, MB'] == pytest.approx(16 * 2 * 7 / 8)
    assert one['NVLink, ms'] == pytest.approx(28e6 / 450e9 * 1e3)
    assert one['backward, ms'] == pytest.approx(128 / 400 * 2 / 3 * 1e3)
    (many,) = rows(table, model='`vmamba_b`', GPUs=512)
    seconds = 28e6 / 450e9 + 16e6 * 2 * 63 / 64 / 12.5e9
    assert many['100 Gb/s, ms'] == pytest.approx(1e3 * seconds)
    images = many['100 Gb/s, from']
    assert images / 400 * 2 / 3 >= seconds > (images - 1) / 400 * 2 / 3


def test_memory_with_and_without_shards(small):
    (row,) = rows(bench_plan.memory(), model='`vmamba_b`')
    assert (row['DDP, GB'], row['FSDP2, 8 GPUs, GB']) == (pytest.approx(0.08), pytest.approx(0.01))
    assert row['of 141 GB, %'] == pytest.approx(8 / 141)
    assert (row['sent by DDP, MB'], row['sent by FSDP2, MB']) == (pytest.approx(28), pytest.approx(42))


def test_features_of_a_billion_images(small):
    tiny, base = bench_plan.features(200).to_dict('records')
    assert (tiny['is'], base['is']) == ('measured', 'computed from `vmamba_t`')
    assert base['images/s of a GPU'] == 4000 and base['cores'] == 160
    assert base['hours, 8 GPUs'] == pytest.approx(1e9 / 4000 / 8 / 3600) and base['output, TB'] == pytest.approx(2)


def test_measured_rates_stand_in_the_log():
    log = (ROOT / 'docs/kernels_log.md').read_text()
    assert [rate for rate in (*TRAINING.values(), *INFERENCE.values()) if f'{rate:,}' not in log] == []


def test_all_sections_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_plan, 'read_rate', lambda transform: 300)
    bench_plan.main(['--docs', str(tmp_path / 'scaling.md')])
    text = (tmp_path / 'scaling.md').read_text()
    assert [text.count(f'<!-- bench_plan {name}: begin -->') for name in ('rates', 'training', 'features')] == [1, 1, 1]
    assert '{' not in text and 'nan' not in text.lower() and '<NA>' not in text
    assert '| `vssd_b` | 88.8 | 16.6 |' in text and 'computed from `vssd_t`' in text
    capsys.readouterr()


def test_read_rate_is_that_of_a_core():
    sizes = []
    assert bench_plan.read_rate(lambda image: sizes.append(image.size), 3) > 0
    assert sizes == [(500, 375)] * 3
