"""compare_training.py through its command line, with train.py itself or with programs that end in other ways."""

import csv

import pandas as pd
import pytest
import timm
import torch
from folders import in_use
from training_runs import signals_kept

from vmamba.models.trained import model_args
from vmamba.tools import compare_training
from vmamba.tools.benchmarks import trainings
from vmamba.tools.compare_training import MODELS, Peer, spread
from vmamba.tools.terminal import number

import psutil

FAST = ['--data', 'packaged/lfw', '--device', 'cpu', '--rates', '1e-3']
TINY = ['--epochs', '1', '--warmup-epochs', '0', '--img-size', '32', '--workers', '0', '--precision', 'fp32']

EPOCHS = """
import os, pathlib, signal, sys, time, yaml
folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])
run = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
(folder / 'checkpoint-00000001.pt').touch()
def write(*accuracies):
    lines = [f'{i + 1},{accuracy}' for i, accuracy in enumerate(accuracies)]
    (folder / 'epochs.csv').write_text('\\n'.join(['epoch,val_top1', *lines]))
write(50.0)
"""
SIZES = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])
(folder / 'validate.csv').write_text('img_size,top1\\n64,50\\n96,40')
print('validate.py: error: --img-size 128: too large')
sys.exit(2)
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
    """Puts a program in the place of train.py, which has done an epoch before it does what is given.

    The one in the place of validate.py takes two sizes.
    """

    def install(text):
        for name, lines in (('SCRIPT', EPOCHS + text), ('VALIDATE', SIZES)):
            path = tmp_path / f'{name}.py'
            path.write_text(lines)
            monkeypatch.setattr(trainings if name == 'SCRIPT' else compare_training, name, path)

    return install


def test_every_run_is_listed_and_one_that_fails_with_its_error(compare, monkeypatch, tmp_path):
    monkeypatch.setitem(compare_training.MODELS, 'broken', Peer('test_vit', args={'dept': 3}))
    out, rows, docs = compare('--models', 'test_vit', 'broken', '--seeds', '0', '--jobs', '2', *TINY)
    found = {row['model']: row for row in rows}
    assert sorted(found) == ['broken', 'test_vit']
    assert not list((tmp_path / 'out').rglob('*.pt'))
    assert (found['broken']['status'], found['broken']['accuracy']) == ('failed', '')
    assert 'dept' in found['broken']['message'] and found['broken']['message'] in docs
    assert '| broken | `test_vit(dept=3)` | 0.00100 | - (0 of 1 runs) |' in docs
    row = found['test_vit']
    with (tmp_path / 'out/test_vit_whole_0.001_0/epochs.csv').open() as file:
        accuracy = float(list(csv.DictReader(file))[-1]['val_top1'])
    assert (row['status'], row['epochs'], row['message'], float(row['accuracy'])) == ('ok', '1', '', accuracy)
    assert all(0 <= float(row[f'{size}x{size}']) <= 100 for size in (64, 96, 128, 192))
    assert f'| test_vit | whole | 0.00100 | 0 | ok | 1 | {number(accuracy)} |' in docs
    assert f'| test_vit | `test_vit` | 0.00100 | {accuracy:.2f} |' in docs and f'{accuracy:.2f}' in out
    assert docs.count('compare_training: ') == 2 and '- runs done: 2 of 2' in docs and 'Interrupted' not in out
    assert (tmp_path / 'training.png').read_bytes() == (tmp_path / 'out/training.png').read_bytes()


def test_each_model_gets_its_best_rate_from_a_part_of_the_training_images(compare, program):
    program(
        'part = run["train_split"], run["val_split"]\n'
        'assert part == (("search", "search_validation") if "search" in folder.name else ("train", "validation"))\n'
        'assert run["lr"] < 0.3, "the loss"\n'
        'best = {"test_vit": (0.1, 0.2), "test_vit2": (0.2,)}[run["model"]]\n'
        'write(0, 1, 2, 3, 40, 5, 6, 70, 85, 90.0 if run["lr"] in best else 80.0)'
    )
    options = '--rates', '0.1', '0.2', '0.3', '--seeds', '5', '6', '--jobs', '3'
    out, rows, docs = compare('--models', 'test_vit', 'test_vit2', *options)
    search = [(row['model'], row['lr'], row['accuracy']) for row in rows if row['part'] == 'search']
    assert sorted(search) == [
        *(('test_vit', '0.1', '90.0'), ('test_vit', '0.2', '90.0'), ('test_vit', '0.3', '')),
        *(('test_vit2', '0.1', '80.0'), ('test_vit2', '0.2', '90.0'), ('test_vit2', '0.3', '')),
    ]
    whole = [(row['model'], row['lr'], row['seed']) for row in rows if row['part'] == 'whole']
    best = (('test_vit', '0.1'), ('test_vit2', '0.2'))
    assert sorted(whole) == [(*pair, seed) for pair in best for seed in ('5', '6')]
    assert '- runs done: 10 of 10' in docs and 'test_vit_search_0.3_5: failed: AssertionError: the loss' in docs
    assert '| test_vit | `test_vit` | 0.100 | 90.00 ± 0.00 | 40.00 / 70.00 / 85.00 |' in docs
    assert '| test_vit2 | 50.00 ± 0.00 | 40.00 ± 0.00 | - (0 of 2 runs) | - (0 of 2 runs) |' in docs
    assert 'test_vit_whole_0.1_5: ok: --img-size 128: too large' in docs


def test_an_interrupt_ends_the_runs_and_the_next_call_continues_them(compare, program, capsys, tmp_path):
    seeds = ['--models', 'test_vit', '--seeds', '0', '1']
    stop = '(folder / "pid").write_text(str(os.getpid())); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)'
    program(f'if folder.name.endswith("_1"):\n    {stop}')
    out, rows, docs = compare(*seeds)
    assert [(row['seed'], row['status']) for row in rows] == [('0', 'ok')]
    assert 'Interrupted: 1 of 2 runs are done' in out and 'runs done: 1 of 2' in docs
    whole, interrupted = (tmp_path / f'out/test_vit_whole_0.001_{seed}' for seed in (0, 1))
    assert not psutil.pid_exists(int((interrupted / 'pid').read_text()))
    assert not list(whole.glob('*.pt')) and list(interrupted.glob('*.pt'))
    program('assert "--resume" in sys.argv and (folder / "pid").exists(); write(75.0)')
    out, rows, docs = compare(*seeds, '--resume')
    assert [(row['seed'], row['status'], row['accuracy']) for row in rows] == [('0', 'ok', '50.0'), ('1', 'ok', '75.0')]
    assert 'runs done: 2 of 2' in docs and 'Interrupted' not in out and '| 62.50 ± 17.68 |' in docs
    with pytest.raises(SystemExit):
        compare(*seeds, '--resume', '--weight-decay', '0.5')
    assert 'has runs with weight_decay 0.05, now 0.5; choose another --output' in capsys.readouterr().err
    for path in (tmp_path / 'out').rglob('*'):  # results alone are enough
        if path.is_file() and path.name not in ('settings.yaml', 'result.json', 'epochs.csv', 'training.csv'):
            path.unlink()
    program('sys.exit(1)')
    assert compare(*seeds, '--resume')[1] == rows


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
    assert f'test_vit_whole_0.001_3: {status}: {message}' in out
    assert f'- test_vit_whole_0.001_3: {status}: {message}' in docs


def test_the_spread_counts_what_is_missing():
    done = [90.0, 92.0]
    assert spread(pd.Series(done)) == '91.00 ± 1.41'
    assert spread(pd.Series([*done, None])) == '91.00 ± 1.41 (2 of 3 runs)'
    assert spread(pd.Series(done[:1])) == '90.00'
    assert spread(pd.Series([None], dtype=float)) == '- (0 of 1 runs)'


@pytest.mark.parametrize(
    'options, expected',
    [
        (['--models', 'vmamba_nan'], "there is no model 'vmamba_nan'; did you mean vmamba_nano or "),
        (['--data', 'packaged/mnist'], "there is no packaged dataset 'mnist'; there are packaged/mnist5k"),
        (['--seeds', '1', '1'], '--seeds names something twice'),
        (['--seed', '1'], "unknown option '--seed'; did you mean --seeds"),
        (['--model-args', '{stride: 6}'], "unknown option '--model-args'"),
        (['--rates', '1e-3', '0'], "must be a number above 0, got '0'"),
        (['--rates', '0.1', '1e-1'], '--rates names something twice'),
        (['--lr-base', 'fast'], "lr_base must be of type float, the command line gives 'fast'"),
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
    (tmp_path / 'test_vit_whole_0.001_0').mkdir()
    with in_use(tmp_path), pytest.raises(SystemExit) as error:
        compare_training.main([*FAST, '--models', 'test_vit', '--seeds', '0', '--resume', '--output', str(tmp_path)])
    assert error.value.code == 2
    assert f'another process is writing into {tmp_path}: wait until it ends' in capsys.readouterr().err
    assert (tmp_path / 'test_vit_whole_0.001_0').exists()


def test_runs_are_not_mixed_with_those_that_are_there(capsys, tmp_path):
    (tmp_path / 'settings.yaml').touch()
    with pytest.raises(SystemExit):
        compare_training.main([*FAST, '--models', 'test_vit', '--output', str(tmp_path)])
    assert 'holds such runs already; give --resume, or choose another --output' in capsys.readouterr().err


def kept(mixer):
    """Numbers that a scan or a convolution keeps of an image, over all directions; 0 for other modules."""
    kind = type(mixer).__name__
    if kind in ('BiMamba', 'SS2D', 'MambaVisionMixer'):
        return mixer.A_log.numel()
    if kind in ('BiMamba2', 'Mamba2'):
        return mixer.A_log.numel() * mixer.headdim * mixer.d_state
    if kind == 'NonCausalSSD':
        return mixer.out_proj.in_features * mixer.d_state
    if kind == 'S4D':
        return mixer.layer.kernel.C.numel()  # complex, of N / 2 states
    if kind == 'H3':
        return 2 * (mixer.ssm_k_kernel.kernel.B.numel() + mixer.kernel.kernel.B.numel())
    return 0


@pytest.mark.parametrize('name', MODELS)
def test_the_states_of_the_table_are_those_of_the_mixers(name):
    peer = MODELS[name]
    args = model_args(dict(model=peer.name, model_args=peer.args, in_chans=3, img_size=64))
    model = timm.create_model(peer.name, num_classes=10, **args).eval()
    state = sum(map(kept, model.modules()))

    def count(attention, inputs):
        nonlocal state
        state += 2 * inputs[0].numel()

    for module in model.modules():
        if type(module).__name__.endswith('Attention'):
            module.register_forward_pre_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert state == peer.state
