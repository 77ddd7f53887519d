"""Classifiers of sequences, trained through the command line of train.py."""

import re
import signal

import pytest
from forked import Forked
from training_runs import ROOT, assert_same, finish, newest, rows, wait_for

from vmamba.tools import make_sequences, train, validate_sequences
from vmamba.tools.sequences import tasks
from vmamba.tools.training import sequences
from vmamba.tools.training.config import load_config

SMALL = (
    *('induction_heads', '--data-args', '{length: 12, train_count: 64, validation_count: 32}', '--device', 'cpu'),
    *('--model-args', '{d_model: 16}', '--batch-size', 8, '--workers', 0, '--log-every', 1, '--log'),
)
TASKS = sorted(path.stem for path in (ROOT / 'configs/sequence').glob('[!_]*.yaml'))


def test_a_run_learns_and_leaves_a_model(run_alone, tmp_path, capsys):
    args = *SMALL, '--data', 'sequences/digits', '--data-args', '{}', '--batch-size', 64, '--epochs', 6, '--lr', 0.01
    run_alone(*args, '--model', 's4d', '--output', tmp_path)
    table = rows(tmp_path)
    assert table[-1]['val_top1'] > 60 > 2 * table[0]['val_top1'] - 60 and 'sequences_per_second' in table[0]
    validate_sequences.main([str(tmp_path / 'best.pt'), '--device', 'cpu', '--output', str(tmp_path / 'scores.csv')])
    best = max(row['val_top1'] for row in table)
    assert f'length 64: {best:.2f} % of 359 answers' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        validate_sequences.main([str(tmp_path / 'best.pt'), '--device', 'cpu', '--lengths', '32'])
    assert 'sequences/digits has sequences of one length' in capsys.readouterr().err


def test_fresh_sequences_of_several_lengths(run_alone, tmp_path, capsys):
    run_alone(*SMALL, '--epochs', 1, '--output', tmp_path)
    options = '--lengths', '5', '30', '--count', '9', '--positions', '40', '--device', 'cpu'
    validate_sequences.main([str(tmp_path / 'best.pt'), *options])
    assert re.findall(r'length (\d+): .* of (\d+) answers', capsys.readouterr().out)[-2:] == [('5', '9'), ('30', '9')]
    (tmp_path / 'other.pt').write_bytes(b'nothing')
    for name, message in (('other.pt', 'cannot read .*other.pt'), ('absent.pt', 'cannot read .*absent.pt')):
        with pytest.raises(SystemExit):
            validate_sequences.main([str(tmp_path / name), '--device', 'cpu'])
        assert re.search(message, capsys.readouterr().err)


LAYER_CFG = {'mamba2': 'mamba2: {headdim: 8}', 'attention': 'attention: {num_heads: 2, rotary_emb_dim: 8}'}


@pytest.mark.parametrize('mixer', ['mamba2', 'h3', 'attention'])
def test_a_mixer_is_named_as_the_model_and_several_positions_are_classified(mixer, run_alone, tmp_path):
    layer_cfg = ', '.join(filter(None, ['mlp: {d_hidden: 16}', LAYER_CFG.get(mixer)]))
    args = f'{{d_model: 16, depth: 1, feed_forward: mlp, layer_cfg: {{{layer_cfg}}}}}'
    data = '--data', 'sequences/selective_copying', '--data-args'
    counts = '{length: 9, tokens: 3, train_count: 16, validation_count: 8}'
    run_alone(*SMALL, *data, counts, '--model', mixer, '--model-args', args, '--epochs', 1, '--output', tmp_path)
    (row,) = rows(tmp_path)
    assert row['updates'] == 2 and row['val_top1'] * 24 / 100 == pytest.approx(round(row['val_top1'] * 24 / 100))


def test_experts_are_trained_on_files(run_alone, tmp_path):
    counts = '--train', '32', '--validation', '8', '--test', '4'
    make_sequences.main(['pathfinder32', '--output', str(tmp_path / 'data'), *counts])
    args = '{d_model: 8, depth: 1, feed_forward: moe, bidirectional: true, layer_cfg: {moe: {num_experts: 2}}}'
    data = '--data', 'sequences/pathfinder32', '--data-dir', tmp_path / 'data', '--data-args', '{}'
    run_alone(*SMALL, *data, '--val-split', 'test', '--model-args', args, '--epochs', 1, '--output', tmp_path / 'run')
    (row,) = rows(tmp_path / 'run')
    assert 1 <= row['max_expert_load'] <= 2 and row['val_top5'] == 100


def test_a_run_that_is_killed_ends_as_one_that_is_not(run_alone, tmp_path):
    """Fresh sequences are those that the whole run draws."""
    args = *SMALL, '--epochs', 2, '--checkpoint-every', 3
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    run_alone(*args, '--output', whole)
    for number, kill in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = Forked(train.main, *args, '--output', broken, '--resume')
        wait_for(process, f'epoch {number + 1} update {4 + 2 * number}/')
        process.send_signal(kill)
        process.wait()
    finish(Forked(train.main, *args, '--output', broken, '--resume'))
    ours, theirs = newest(broken), newest(whole)
    for key in ('state_dict', 'optimizer', 'update'):
        assert_same(ours[key], theirs[key])
    assert [row['train_loss'] for row in rows(broken)] == [row['train_loss'] for row in rows(whole)]


@pytest.mark.parametrize('name', TASKS)
def test_configurations_fit(name):
    """Of the data only the definition is needed."""
    config = load_config(ROOT / f'configs/sequence/{name}.yaml', {})
    if config.task == 'sequence':
        task = tasks.definition(config.data.removeprefix(tasks.PREFIX), **config.data_args)
        model = sequences.create_model(config, task).to('meta')
        assert sum(parameter.numel() for parameter in model.parameters()) > 50_000


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--data', 'packaged/digits'], 'data of sequences must be sequences/ and one of .*induction_heads'),
        (
            ['--data', 'sequences/listops', '--data-args', '{}', '--data-dir', 'x'],
            'there is no x/train.npz: make it by',
        ),
        (['--model', 'lstm'], 'model must be one of the mixers mamba, .*, got .lstm.'),
        (['--model-args', '{d_modle: 3}'], 'cannot build mamba: .*d_modle'),
        (['--data-args', '{lengt: 3}'], "has no option 'lengt'; did you mean length"),
        (['--batch-size', '1000'], 'one update takes 1000 sequences, but an epoch has fewer'),
        (['--mixup', '0.5'], 'mixup is not for sequences'),
        (['--val-split', 'train'], 'train_split and val_split are both .train.'),
    ],
)
def test_wrong_settings_are_one_line(options, message, run_alone, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run_alone(*SMALL, *options, '--output', tmp_path / 'run')
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line
