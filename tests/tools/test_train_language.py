"""Language models on bytes, trained through the command line of train.py."""

import random
import re
import signal

import pytest
from forked import Forked
from training_runs import assert_same, finish, newest, rows, wait_for

from vmamba.sequence import ByteFiles, LanguageModel, bits_per_byte
from vmamba.tools import train

SMALL = (
    *('mambabyte_nano', '--model-args', '{d_model: 16, n_layer: 2}', '--seq-len', 64, '--batch-size', 4),
    *('--device', 'cpu', '--workers', 0, '--log-every', 1, '--warmup-epochs', 0, '--log'),
)


@pytest.fixture
def text(tmp_path):
    """A file of 6,000 bytes that are easy to predict."""
    draw = random.Random(0)
    words = [bytes(draw.choices(b'abcdefgh', k=5)) + b' ' for _ in range(4)]
    path = tmp_path / 'text'
    path.write_bytes(b''.join(draw.choices(words, k=1000)))
    return path


def test_a_run_learns_and_leaves_a_model(run_alone, text, tmp_path):
    output = tmp_path / 'run'
    run_alone(*SMALL, '--data', text, '--epochs', 4, '--lr', 0.01, '--output', output)
    table = rows(output)
    found = [row['val_bits_per_byte'] for row in table]
    assert len(found) == 4 and found[-1] < 2 < 5 < table[0]['train_loss'] / 0.6931 + 2
    assert 'bytes_per_second' in (output / 'epochs.csv').read_text()
    model = LanguageModel.from_pretrained(output / 'best')
    kept, held = ByteFiles.find(text).hold_out(0.05)
    assert (len(kept), len(held)) == (5700, 300)
    ids, _ = held.read(0, 300)
    assert bits_per_byte(model, ids, 64) == pytest.approx(min(found), rel=1e-4)


@pytest.mark.parametrize('carry', [True, False], ids=['state-carried', 'windows-shuffled'])
def test_a_run_that_is_killed_ends_as_one_that_is_not(carry, run_alone, text, tmp_path):
    args = *SMALL, '--data', text, '--epochs', 2, '--checkpoint-every', 3
    args = *args, '--carry-state' if carry else '--no-carry-state'
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    run_alone(*args, '--output', whole)
    for number, kill in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = Forked(train.main, *args, '--output', broken, '--resume')
        wait_for(process, f'epoch {number + 1} update {5 + 2 * number}/')
        process.send_signal(kill)
        process.wait()
    finish(Forked(train.main, *args, '--output', broken, '--resume'))
    ours, theirs = newest(broken), newest(whole)
    for key in ('state_dict', 'optimizer', 'carried', 'update'):
        assert_same(ours[key], theirs[key])
    assert bool(ours['carried']) == carry
    keys = 'train_loss', 'val_bits_per_byte'
    assert [[row[key] for key in keys] for row in rows(broken)] == [[row[key] for key in keys] for row in rows(whole)]


def test_a_carried_state_is_that_of_all_bytes_before(run_alone, text, tmp_path):
    """With a learning rate of almost 0 the loss is that of whole rows, of which each walks a part of the bytes."""
    output = tmp_path / 'run'
    run_alone(*SMALL, '--data', text, '--epochs', 1, '--lr', 1e-12, '--min-lr', 0, '--carry-state', '--output', output)
    model = LanguageModel.from_pretrained(output / 'best')
    kept, _ = ByteFiles.find(text).hold_out(0.05)
    ids, updates = kept.read(0, len(kept))[0], 89 // 4
    starts = [row * updates * 64 for row in range(4)]
    losses = [bits_per_byte(model, ids[s : s + updates * 64 + 1], 64, carry_state=True) for s in starts]
    assert rows(output)[0]['train_loss'] == pytest.approx(sum(losses) / 4 * 0.693147, rel=1e-4)


def test_documents_are_packed_and_a_model_is_fine_tuned(run_alone, tmp_path):
    folder = tmp_path / 'files'
    folder.mkdir()
    for i in range(40):
        (folder / f'{i}.txt').write_bytes(bytes([97 + i % 26]) * 50)
        (folder / f'{i}.bin').write_bytes(bytes(200))
    options = '--data-args', '{pattern: "*.txt"}', '--data', folder, '--pack-documents', '--epochs', 1, '--lr', 0.003
    run_alone(*SMALL, *options, '--output', tmp_path / 'one')
    run_alone(*SMALL, *options, '--checkpoint', tmp_path / 'one/best', '--output', tmp_path / 'two')
    one, two = (rows(tmp_path / name)[0] for name in ('one', 'two'))
    assert two['train_loss'] < one['train_loss'] and len(newest(tmp_path / 'two')['carried']) == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--data', 'absent'], 'there is no file or folder absent'),
        ([], 'no data: give --data FILE or --data FOLDER'),
        (['--model', 'mambabyte_nan'], 'no language model .mambabyte_nan.; did you mean mambabyte_nano'),
        (['--model-args', '{d_modle: 3}'], 'cannot build mambabyte_nano: .*d_modle'),
        (['--model-args', '{vocab_size: 99}'], 'bytes need a vocabulary of 256, mambabyte_nano has one of 99'),
        (['--batch-size', '1000'], 'one update takes 1000 windows, but an epoch has fewer'),
        (['--ema-decay', '0.9'], 'ema_decay is for images'),
        (['--carry-state', '--accumulate', '2'], 'carry_state needs one process'),
        (
            ['--carry-state', '--model-args', '{attn_layer_idx: [0], attn_cfg: {num_heads: 2}}'],
            'the model has attention',
        ),
        (['--checkpoint', 'absent'], 'absent is neither a folder nor the id of a model'),
    ],
)
def test_wrong_settings_are_one_line(options, message, run_alone, text, tmp_path, capsys):
    data = () if not options or '--data' in options else ('--data', text)
    with pytest.raises(SystemExit) as error:
        run_alone('mambabyte_nano', '--device', 'cpu', *data, *options, '--output', tmp_path / 'run')
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line
