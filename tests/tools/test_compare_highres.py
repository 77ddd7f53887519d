import csv
import sys

import compare_highres
import pytest
import torch
from measure import Case, Result, build_model, is_out_of_memory
from rich.console import Console


def read_rows(folder):
    return list(csv.DictReader((folder / 'highres.csv').open()))


def test_one_row_a_model_and_size(tmp_path):
    arguments = ['--sizes', '32', '64', '--repeats', '1', '--device', 'cpu', '--batch-size', '2']
    compare_highres.main(['--models', 'vmamba_nano', *arguments, '--output', str(tmp_path)])
    rows = read_rows(tmp_path)
    assert [(row['model'], row['size'], row['status']) for row in rows] == [
        ('vmamba_nano', '32', 'ok'),
        ('vmamba_nano', '64', 'ok'),
    ]
    for row in rows:
        assert float(row['images_per_second']) > 0
        assert float(row['peak_mib']) >= 0
        assert row['torch'] == torch.__version__
        assert (row['dtype'], row['batch_size'], row['device']) == ('float32', '2', 'cpu')
    assert (tmp_path / 'highres.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the limit is a Linux one')
def test_running_out_of_memory_is_a_result(tmp_path):
    arguments = ['--sizes', '2048', '--memory-limit', '64', '--device', 'cpu', '--output', str(tmp_path)]
    compare_highres.main(['--models', 'vmamba_nano', *arguments])
    (row,) = read_rows(tmp_path)
    assert row['status'] == 'OOM'
    assert row['images_per_second'] == row['peak_mib'] == ''
    assert (tmp_path / 'highres.png').is_file()


def test_failing_is_a_result(tmp_path):
    arguments = ['--sizes', '32', '--device', 'cpu', '--output', str(tmp_path)]
    compare_highres.main(['--models', 'no_such_model', *arguments])
    (row,) = read_rows(tmp_path)
    assert row['status'] == 'failed'
    assert 'no_such_model' in row['message']


@pytest.mark.parametrize(
    'program, status',
    [
        ('import time; time.sleep(60)', 'timeout'),
        ('import os; os.kill(os.getpid(), 9)', 'OOM'),
        ('raise SystemExit("broken")', 'failed'),
    ],
    ids=['too slow', 'killed', 'broken'],
)
def test_a_child_that_ends_badly_is_a_result(monkeypatch, tmp_path, program, status):
    (tmp_path / 'measure.py').write_text(program)
    monkeypatch.setattr(compare_highres, '__file__', str(tmp_path / 'compare_highres.py'))
    assert compare_highres.run_case(Case('vmamba_nano', 32), timeout=2).status == status


def test_table_and_figure_of_mixed_results(tmp_path):
    measurements = [
        (Case('a', 224), Result('ok', 10.0, 100.0, 50.0)),
        (Case('a', 448), Result('OOM')),
        (Case('b', 224), Result('timeout', message='took more than 1 s')),
    ]
    console = Console(record=True, width=100)
    compare_highres.write_report(measurements, tmp_path, console, 'a device')
    text = console.export_text()
    assert 'OOM' in text
    assert 'b at 224: timeout: took more than 1 s' in text
    assert len(read_rows(tmp_path)) == 3


def test_attention_is_chosen_by_the_label():
    plain, fused = (build_model(f'deit_tiny_patch16_224:{kind}', 32) for kind in ('plain', 'fused'))
    assert not plain.blocks[0].attn.fused_attn
    assert fused.blocks[0].attn.fused_attn
    with pytest.raises(ValueError, match="got 'other'"):
        build_model('deit_tiny_patch16_224:other', 32)


@pytest.mark.parametrize('name', ['vim_nano', 'vmamba_nano', 'deit_tiny_patch16_224'])
def test_models_are_built_for_the_size_without_classifier(name):
    model = build_model(name, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)


def test_peak_is_at_least_the_largest_map():
    result = compare_highres.run_case(Case('vmamba_nano', 512, repeats=1), timeout=60)
    assert result.peak_mib >= 16 * 256 * 256 * 4 / 2**20  # the output of the first convolution, which is fp32


@pytest.mark.parametrize(
    'error, expected',
    [
        (torch.OutOfMemoryError('CUDA out of memory'), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError('shapes do not match'), False),
    ],
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected
