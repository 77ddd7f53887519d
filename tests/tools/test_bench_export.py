import pandas as pd
import pytest
import timm
import torch

import vmamba  # noqa: F401
from vmamba.tools import bench_export
from vmamba.tools.benchmarks.report import replace_section

pytest.importorskip('onnxruntime')
SMALL = dict(depth=1, embed_dim=16, d_state=2, img_size=16)


def table_of(text):
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:1] == '|']
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_both_kinds_of_weights_are_measured_and_written_between_own_markers(tmp_path, monkeypatch, capsys):
    def load(spec, args):
        assert str(spec) == 'vim_nano=untrained'
        return timm.create_model('vim_nano', **SMALL).eval()

    monkeypatch.setattr(bench_export.weights, 'load_model', load)
    docs = tmp_path / 'benchmarks.md'
    docs.write_text(replace_section('# Benchmarks\n', 'compare_training', 'other'))
    threads = torch.get_num_threads()
    bench_export.main(['--models', 'vim_nano', '--repeats', '2', '--wall', '--docs', str(docs)])
    text = docs.read_text()
    assert torch.get_num_threads() == threads
    assert text.index('<!-- compare_training: end -->') < text.index('<!-- bench_export: begin -->')
    assert (
        f'`vmamba bench export --models vim_nano --repeats 2 --wall --docs {docs}`' in text
        and 'Wall time is of 2 threads' in text
        and ' cores, load average ' in text
    )
    fp32, int8 = table_of(text)
    assert (fp32['weights'], int8['weights']) == ('fp32', 'int8') and fp32['model'] == '`vim_nano`'
    assert float(int8['MiB']) != float(fp32['MiB']) and int(fp32['nodes']) != int(int8['nodes'])
    for row in (fp32, int8):
        for clock in ('CPU', 'wall'):
            ours, theirs = (float(row[f'{clock} ms, {name}']) for name in ('ONNX Runtime', 'PyTorch'))
            assert float(row[f'{clock} ratio']) == pytest.approx(ours / theirs, rel=0.02)
    capsys.readouterr()


def test_times_are_without_the_first_pass(tmp_path, monkeypatch):
    ticks = iter(range(0, 1000, 1))
    monkeypatch.setattr(bench_export, 'session', lambda path, threads: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, 'run', lambda self, *args: None, raising=False)
    order = []

    def clock():
        order.append(torch.get_num_threads())
        return next(ticks) ** 2

    times = bench_export.milliseconds(torch.nn.Identity(), torch.zeros(1), tmp_path, 1, clock, 2)
    # Passes take 1, 5, 9, ... : three of each in turn, of which the first is dropped.
    assert times.to_dict('list') == {'fp32': [13e3, 25e3], 'int8': [17e3, 29e3], 'PyTorch': [21e3, 33e3]}
    assert set(order) == {1}


def test_accuracy_is_that_of_the_runs_validation_images(run_alone, tmp_path, capsys):
    run, docs = tmp_path / 'run', tmp_path / 'docs.md'
    options = '--epochs', 3, '--warmup-epochs', 0, '--workers', 0, '--device', 'cpu', '--lr', 3e-3
    run_alone('lfw_vmamba_nano', *options, '--model-args', '{depths: [1, 1], embed_dim: 16}', '--output', run)
    expected = pd.read_csv(run / 'epochs.csv').val_top1.max()
    bench_export.main(['--runs', str(run), '--docs', str(docs)])
    fp32, int8 = table_of(docs.read_text())
    assert '<!-- bench_export accuracy: begin -->' in docs.read_text()
    assert fp32['model'] == '`vmamba_nano`' and (fp32['data'], fp32['images']) == ('packaged/lfw', '40')
    assert expected > 60 and float(fp32['top-1']) == pytest.approx(expected, abs=0.1)
    assert float(int8['top-1']) == pytest.approx(expected, abs=5)  # two images
    assert float(int8['MiB']) < float(fp32['MiB'])
    capsys.readouterr()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--models', 'vim_nan'], "unknown model 'vim_nan'; did you mean vim_nano"),
        (['--models', 'resnet18', '--repeats', '0'], "must be a whole number above 0, got '0'"),
        (['--runs', 'absent'], 'absent/config.yaml'),
    ],
)
def test_failures_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        bench_export.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
