"""compare_sequences.py through its command line, with programs in the place of those that train and evaluate."""

import csv
import json

import pytest
from training_runs import signals_kept

from vmamba.sequence import ByteFiles
from vmamba.tools import compare_sequences
from vmamba.tools.benchmarks import trainings
from vmamba.tools.compare_sequences import BYTES, CASES, Run, SequenceComparison, parameters, parse_args

TRAIN = """
import pathlib, sys, yaml
folder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])
run = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
assert run['model'] != 'h3', 'the loss'
(folder / 'epochs.csv').write_text('epoch,val_top1\\n1,50')
(folder / 'best.pt').touch()
"""
EVALUATE = """
import pathlib, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
score = 'bits_per_byte,window\\n2.5,' + option('--window') if '--window' in sys.argv else 'length,accuracy\\n256,90'
pathlib.Path(option('--output')).write_text(score + ('\\n64,80' if '64' in sys.argv else ''))
"""


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process, with a library of four files; returns the rows and the docs."""
    for number in range(4):
        path = tmp_path / f'library/package/file{number}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'x = {number}\n' * 50)
    (tmp_path / 'library/test').mkdir()
    (tmp_path / 'library/test/test_it.py').write_text('0')
    monkeypatch.setattr(compare_sequences.sysconfig, 'get_path', lambda name: tmp_path / 'library')
    monkeypatch.setattr(compare_sequences, 'HELD_OUT', 0.25)
    for name, text in (('SCRIPT', TRAIN), ('VALIDATE', EVALUATE), ('EVALUATE', EVALUATE)):
        (tmp_path / f'{name}.py').write_text(text)
        monkeypatch.setattr(trainings if name == 'SCRIPT' else compare_sequences, name, tmp_path / f'{name}.py')

    def call(*args):
        places = '--output', str(tmp_path / 'out'), '--docs', str(tmp_path / 'docs.md'), '--device', 'cpu'
        with signals_kept():
            compare_sequences.main([*args, *places])
        with (tmp_path / 'out/sequences.csv').open() as file:
            return list(csv.DictReader(file)), (tmp_path / 'docs.md').read_text()

    return call


def test_every_run_is_listed_and_later_calls_add_to_the_report(compare, tmp_path, capsys):
    heads = '--tasks', 'induction_heads', '--models', 'mamba', 'h3', '--lengths', '64'
    rows, docs = compare(*heads, '--seeds', '0', '1')
    found = sorted((row['model'], row['seed'], row['status'], row['result']) for row in rows)
    assert found == [('h3', '0', 'failed', ''), ('h3', '1', 'failed', '')] + [
        ('mamba', seed, 'ok', '90.0') for seed in '01'
    ]
    assert '| induction_heads | mamba | 68 | 1 | 80.00 ± 0.00 | 90.00 ± 0.00 | 100 up to 1048576 |' in docs
    assert 'induction_heads_h3_1: failed: AssertionError: the loss' in docs
    assert not list((tmp_path / 'out').rglob('*.pt'))
    with pytest.raises(SystemExit):
        compare(*heads, '--seeds', '0')
    assert 'is there already; give --resume' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare(*heads, '--seeds', '0', '--resume', '--epochs', '3')
    assert 'was made with epochs 15, now 3; choose another --output' in capsys.readouterr().err
    docs = compare('--tasks', 'bytes', '--models', 'mamba', 'transformer', '--resume')[1]
    assert '| induction_heads | mamba | 68 | 1 | 80.00 ± 0.00 | 90.00 ± 0.00 | 100 up to 1048576 |' in docs
    assert '| bytes | transformer | 3548 | 1 | 2.500 ± 0.000 | 2.500 ± 0.000 |' in docs and '| bz2 |' in docs


def test_held_out_files_are_not_trained_on(compare, tmp_path):
    compare('--tasks', 'bytes', '--models', 'mamba', '--seeds', '0')
    held, facts = (tmp_path / 'out/held_out').read_bytes(), json.loads((tmp_path / 'out/sources.json').read_text())
    files = [part.path.read_bytes() for part in ByteFiles.find(tmp_path / 'out/sources').parts]
    assert (facts['files'], facts['size'], len(files)) == (1, len(held), 3)
    assert held not in files and held in [path.read_bytes() for path in (tmp_path / 'library/package').iterdir()]


def test_models_of_a_task_have_about_the_same_size(tmp_path):
    comparison = SequenceComparison(parse_args(['--output', str(tmp_path), '--device', 'cpu']), [])
    (tmp_path / 'sources').mkdir()
    for task in ('listops', 'pathfinder32', BYTES):
        runs = [Run(task, model, 0) for model in CASES[task].models]
        sizes = [parameters(run, comparison.settings(run)) for run in runs]
        assert max(sizes) < 1.1 * min(sizes), sizes


def test_an_unknown_model_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_sequences.main(['--models', 'mamba3', '--output', str(tmp_path)])
    assert "--models: invalid choice: 'mamba3' (choose from" in capsys.readouterr().err
