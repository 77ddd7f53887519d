"""`vmamba bench generation` on small models."""

import pandas as pd
import pytest

from vmamba.sequence import presets
from vmamba.tools import bench_generation


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, 'mamba_130m', dict(d_model=16, n_layer=2, vocab_size=50))
    monkeypatch.setattr(bench_generation, 'read_rate', lambda device: 1e9)


OPTIONS = '--device', 'cpu', '--precision', 'fp32', '--tokens', '8'


def test_rows_of_every_batch_size(small, tmp_path, capsys):
    bench_generation.main([*OPTIONS, '--batch', '1', '2', '--output', str(tmp_path / 'out.csv')])
    table = pd.read_csv(tmp_path / 'out.csv')
    assert table.batch.tolist() == [1, 2] and set(table.source) == {'vmamba'}
    assert 'model mamba_130m, source vmamba, batch 2' in capsys.readouterr().out


def test_the_cache_of_attention_grows_and_that_of_mamba_does_not(small, tmp_path):
    models = '--models', 'mamba_130m', 'transformer', '--lengths', '64', '128'
    output = '--output', str(tmp_path / 'out.csv'), '--docs', str(tmp_path / 'docs.md')
    bench_generation.main([*OPTIONS, *models, *output])
    assert '## Generation by length' in (tmp_path / 'docs.md').read_text() and (tmp_path / 'generation.png').is_file()
    memory = pd.read_csv(tmp_path / 'out.csv').cache_mib.tolist()
    assert memory[0] == memory[1] and memory[3] > 1.9 * memory[2]


def test_an_unknown_model_is_one_line(capsys):
    with pytest.raises(SystemExit):
        bench_generation.main([*OPTIONS, '--models', 'mamba_3b'])
    assert "argument --models: invalid choice: 'mamba_3b' (choose from" in capsys.readouterr().err
