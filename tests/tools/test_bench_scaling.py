import pandas as pd
import pytest

from vmamba.tools import bench_scaling, train
from vmamba.tools.training.config import load_config

PROGRAM = """
import os, pathlib, sys
folder, count = pathlib.Path(sys.argv[-1].partition('=')[2]), int(os.environ.get('WORLD_SIZE', 1))
row = ',{},100\\n'
if os.environ.get('RANK', '0') == '0':
    folder.mkdir(exist_ok=True)
    (folder / 'epochs.csv').write_text('epoch,images_per_second,memory_mib\\n' + row.format(1) + row.format(8 * count))
"""


def test_one_and_two_processes_are_compared_and_written(monkeypatch, tmp_path, capsys):
    script = tmp_path / 'train.py'
    script.write_text(PROGRAM)
    monkeypatch.setattr(bench_scaling, 'SCRIPT', script)
    docs = tmp_path / 'benchmarks.md'
    options = ['--device', 'cpu', '--model', 'vmamba_nano', '--precision', 'fp32', '--batch-size', '2']
    options += ['--updates', '1', '--epochs', '2', '--processes', '2']
    bench_scaling.main([*options, '--docs', str(docs)])
    text = docs.read_text()
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith(('| 1 |', '| 2 |'))]
    assert [row[:2] for row in rows] == [['1', '2'], ['2', '4']]
    assert [row[2:] for row in rows] == [['8.00', '1.00', '100'], ['16.0', '1.00', '100']]
    assert f'`vmamba bench scaling {" ".join(options)} ' in text
    assert 'vmamba_nano' in capsys.readouterr().out


def test_runs_alternate_and_their_epochs_are_pooled_without_the_first(monkeypatch):
    order = []

    def run(count, args):
        order.append(count)
        return pd.DataFrame([dict(images_per_second=rate * count, memory_mib=7) for rate in (len(order), 30)])

    monkeypatch.setattr(bench_scaling, 'run', run)
    args = bench_scaling.parse_args(['--device', 'cpu', '--repeats', '2'])
    epochs = bench_scaling.measure([1, 2, 4], args)
    assert order == [1, 2, 4, 4, 2, 1]
    args.batch_size = 8
    (table,) = bench_scaling.report_of(epochs, args, []).tables
    assert list(table['images/s']) == [18, 2 * 17.5, 4 * 17]
    assert list(table.iloc[1]) == [2, 16, 35, pytest.approx(35 / 36), 7]


def test_command_lines():
    args = bench_scaling.parse_args(['--device', 'cpu', '--shard', '--compile', '--updates', '10'])
    single, several = (bench_scaling.command(count, args, 'out') for count in (1, 4))
    assert '--shard' not in single and '--compile' in single
    assert several[several.index('--nproc-per-node') + 1] == '4'
    path, resume, values = train.parse_args(several[several.index(str(bench_scaling.SCRIPT)) + 1 :])
    config = load_config(path, values)  # train.py takes them
    assert config.synthetic_images == 128 * 10 * 4 and config.shard and config.compile and not resume


def test_a_run_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    script = tmp_path / 'train.py'
    script.write_text("import sys; print('Warning'); sys.exit('train.py: error: there is no model')")
    monkeypatch.setattr(bench_scaling, 'SCRIPT', script)
    with pytest.raises(SystemExit) as error:
        bench_scaling.main(['--device', 'cpu', '--processes', '1'])
    assert error.value.code == 2
    assert 'training with 1 process(es) failed: there is no model' in capsys.readouterr().err
