"""compare_training.py through its command line, with train.py itself or with programs that end in other ways."""

import csv
import statistics

import pandas as pd
import pytest
from folders import in_use
from training_runs import signals_kept

from vmamba.tools import compare_training
from vmamba.tools.compare_training import Peer, spread
from vmamba.tools.terminal import number

import psutil

FAST = ['--tasks', 'lfw', '--device', 'cpu']
TINY = ['--epochs', '1', '--warmup-epochs', '0', '--img-size', '32', '--workers', '0', '--precision', 'fp32']

EPOCH = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])
(folder / 'epochs.csv').write_text('epoch,val_top1\\n1,50\\n')
(folder / 'best.pt').touch()
"""


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; returns what it printed, the rows of its CSV file, and what it wrote."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)

    def call(*args):
        with signals_kept():
            compare_training.main(
                [*FAST, *args, '--output', str(tmp_path / 'out'), '--docs', str(tmp_path / 'docs.md')]
            )
        with (tmp_path / 'out/training.csv').open() as file:
            return capsys.readouterr().out, list(csv.DictReader(file)), (tmp_path / 'docs.md').read_text()

    return call


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a program in the place of train.py, which has done an epoch before it does what is given."""

    def install(text):
        path = tmp_path / 'program.py'
        path.write_text(EPOCH + text)
        monkeypatch.setattr(compare_training, 'SCRIPT', path)

    return install


def test_every_run_is_listed_and_one_that_fails_with_its_error(compare, monkeypatch, tmp_path):
    monkeypatch.setitem(compare_training.MODELS, 'broken', Peer('test_vit', {'dept': 3}))
    out, rows, docs = compare('--models', 'test_vit', 'broken', '--seeds', '0', '1', '--jobs', '2', *TINY)
    found = {(row['model'], row['seed']): row for row in rows}
    assert sorted(found) == [('broken', '0'), ('broken', '1'), ('test_vit', '0'), ('test_vit', '1')]
    accuracies = []
    for (model, seed), row in found.items():
        folder = tmp_path / f'out/lfw_{model}_{seed}'
        assert not list(folder.glob('*.pt'))
        if model == 'broken':
            assert row['status'] == 'failed' and row['accuracy'] == ''
            assert 'dept' in row['message'] and row['message'] in docs
            continue
        with (folder / 'epochs.csv').open() as file:
            assert float(row['accuracy']) == float(list(csv.DictReader(file))[-1]['val_top1'])
        accuracies.append(float(row['accuracy']))
        assert (row['status'], row['epochs'], row['parameters_m']) == ('ok', '1', '0.3')
        assert f'| lfw | test_vit | {seed} | ok | 1 | {number(accuracies[-1])} |' in docs
    expected = f'{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}'
    assert f'| test_vit | `test_vit` | 0.300 | {expected} |' in docs
    assert '| broken | `test_vit(dept=3)` | - | - (0 of 2 runs) |' in docs
    assert docs.count('compare_training: ') == 2 and '- runs done: 4 of 4' in docs
    assert expected in out and 'Interrupted' not in out
    assert (tmp_path / 'training.png').read_bytes() == (tmp_path / 'out/training.png').read_bytes()


def test_an_interrupt_reports_what_is_there_and_ends_the_runs(compare, program, tmp_path):
    program('(folder / "pid").write_text(str(os.getpid())); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)')
    out, rows, docs = compare('--models', 'test_vit', '--seeds', '0', '1')
    assert [(row['seed'], row['status'], row['epochs']) for row in rows] == [('0', 'interrupted', '1')]
    assert 'Interrupted: 0 of 2 runs are done' in out
    assert '| lfw | test_vit | 0 | interrupted | 1 | - |' in docs and 'runs done: 0 of 2' in docs
    folder = tmp_path / 'out/lfw_test_vit_0'
    assert not psutil.pid_exists(int((folder / 'pid').read_text()))
    assert not (folder / 'best.pt').exists()


def test_what_an_interrupt_left_out_is_trained_later(compare, program, capsys, tmp_path):
    seeds = ['--models', 'test_vit', '--seeds', '0', '1']
    program('if folder.name.endswith("_1"):\n    os.kill(os.getppid(), signal.SIGINT)\n    time.sleep(60)')
    _, rows, _ = compare(*seeds)
    assert [(row['seed'], row['status']) for row in rows] == [('0', 'ok'), ('1', 'interrupted')]
    program('(folder / "epochs.csv").write_text("epoch,val_top1\\n1,75\\n")')
    out, rows, docs = compare(*seeds, '--resume')
    assert [(row['seed'], row['status'], row['accuracy']) for row in rows] == [('0', 'ok', '50.0'), ('1', 'ok', '75.0')]
    assert 'runs done: 2 of 2' in docs and 'Interrupted' not in out and '| 62.50 ± 17.68 |' in docs
    with pytest.raises(SystemExit):
        compare(*seeds, '--resume', '--lr', '0.5')
    assert 'has runs with lr 0.001, now 0.5; choose another --output' in capsys.readouterr().err
    assert compare(*seeds, '--resume')[1] == rows  # nothing was removed


@pytest.mark.parametrize(
    'text, options, status, message',
    [
        ('time.sleep(60)', ['--timeout', '0.5'], 'timeout', 'took more than 0.5 s'),
        ('os.kill(os.getpid(), signal.SIGKILL)', [], 'failed', 'exit status -9'),
        ('raise RuntimeError("CUDA out of memory")', [], 'failed', 'RuntimeError: CUDA out of memory'),
        ('print("train.py: error: the loss"); print("[end]"); sys.exit(2)', [], 'failed', 'the loss'),
    ],
    ids=['too slow', 'killed', 'crash', 'error'],
)
def test_a_run_that_ends_badly_is_a_result(compare, program, text, options, status, message):
    program(text)
    out, rows, docs = compare('--models', 'test_vit', '--seeds', '3', *options)
    assert [(row['status'], row['message'], row['accuracy']) for row in rows] == [(status, message, '')]
    assert f'test_vit on lfw, seed 3: {status}: {message}' in out
    assert f'- test_vit on lfw, seed 3: {status}: {message}' in docs


def test_the_spread_counts_what_is_missing():
    done = [90.0, 92.0]
    assert spread(pd.Series(done)) == '91.00 ± 1.41'
    assert spread(pd.Series([*done, None])) == '91.00 ± 1.41 (2 of 3 runs)'
    assert spread(pd.Series(done[:1])) == '90.00'
    assert spread(pd.Series([None], dtype=float)) == '- (0 of 1 runs)'


@pytest.mark.parametrize(
    'options, expected',
    [
        (['--models', 'vmamba_nan'], "there is no model 'vmamba_nan'; did you mean vmamba_nano or vmamba_t or"),
        (['--tasks', 'mnist'], "invalid choice: 'mnist' (choose from "),
        (['--seeds', '1', '1'], '--seeds names something twice'),
        (['--seed', '1'], "unknown option '--seed'; did you mean --seeds"),
        (['--model-args', '{stride: 6}'], "unknown option '--model-args'"),
        (['--lr', 'fast'], "lr must be of type float, the command line gives 'fast'"),
        (['--weight-dekay', '0'], "unknown option '--weight-dekay'; did you mean --weight-decay"),
        (['--modles', 'vit'], "unknown option '--modles'; did you mean --models"),
        (['--job', '2'], "unknown option '--job'; did you mean --jobs"),
        (['--jobs', '0'], "must be a whole number above 0, got '0'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_wrong_options_are_one_line(capsys, tmp_path, options, expected):
    with pytest.raises(SystemExit) as error:
        compare_training.main([*options, '--output', str(tmp_path / 'out')])
    assert error.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


def test_a_comparison_that_goes_on_keeps_its_runs(capsys, tmp_path):
    (tmp_path / 'lfw_test_vit_0').mkdir()
    with in_use(tmp_path), pytest.raises(SystemExit) as error:
        compare_training.main([*FAST, '--models', 'test_vit', '--seeds', '0', '--resume', '--output', str(tmp_path)])
    assert error.value.code == 2
    assert f'another process is writing into {tmp_path}: wait until it ends' in capsys.readouterr().err
    assert (tmp_path / 'lfw_test_vit_0').exists()


def test_runs_are_not_mixed_with_those_that_are_there(capsys, tmp_path):
    (tmp_path / 'lfw_test_vit_0').mkdir()
    with pytest.raises(SystemExit):
        compare_training.main([*FAST, '--models', 'test_vit', '--output', str(tmp_path)])
    assert 'holds such runs already; give --resume, or choose another --output' in capsys.readouterr().err
