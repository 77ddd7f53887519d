"""Files as bytes, their windows, bits per byte, and sizes of the presets."""

import math

import pytest
import torch
from models import make

from vmamba.sequence import PRESETS, ByteFiles, ByteWindows, bits_per_byte, create_language_model


@pytest.fixture
def folder(tmp_path):
    for name, text in (('b/x', b'defgh'), ('a', b'abc'), ('c', b''), ('d', bytes(range(250, 256)))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    (tmp_path / 'link').symlink_to(tmp_path / 'a')
    return tmp_path


def test_bytes_of_files_in_a_row(folder):
    files, text = ByteFiles.find(folder), b'abcdefgh' + bytes(range(250, 256))
    assert len(files) == 14 and [part.path.name for part in files.parts] == ['a', 'x', 'd']
    numbers = [0] * 3 + [1] * 5 + [2] * 6
    for start in range(14):
        for stop in (start, start + 1, 9, 20):
            ids, found = files.read(start, stop)
            assert bytes(ids.tolist()) == text[start:stop] and found.tolist() == numbers[start:stop]
            assert ids.dtype == found.dtype == torch.int64
    assert len(ByteFiles.find(folder / 'a')) == 3


def test_files_are_held_out_whole_and_equal_ones_together(tmp_path):
    for i in range(40):
        (tmp_path / f'{i:02}').write_bytes(b'%d' % (i // 2) * 10)
    files = ByteFiles.find(tmp_path)
    kept, held = files.hold_out(0.25, seed=1)
    assert 0.15 < len(held) / len(files) < 0.35 and len(kept) + len(held) == len(files)
    contents = [{part.path.read_bytes() for part in side.parts} for side in (kept, held)]
    assert not contents[0] & contents[1]
    again, other = files.hold_out(0.25, seed=1)[1], files.hold_out(0.25, seed=2)[1]
    assert again.parts == held.parts != other.parts
    kept, held = ByteFiles.find(tmp_path / '00').hold_out(0.2)
    assert (len(kept), len(held)) == (8, 2) and held.read(0, 9)[0].tolist() == [48, 48]
    assert held.read(1, 9)[1].tolist() == [0]


def test_windows_and_their_next_bytes(folder):
    files = ByteFiles.find(folder)
    text, numbers = files.read(0, 14)
    windows = ByteWindows(files, 4, packed=True)
    assert len(windows) == 4
    for i in range(4):
        (ids, seq_idx), targets = windows[i]
        length = min(4, 13 - 4 * i)
        assert ids[:length].equal(text[4 * i : 4 * i + length]) and len(ids) == len(targets) == 4
        assert seq_idx[:length].equal(numbers[4 * i : 4 * i + length] - numbers[4 * i])
        begins = numbers[4 * i + 1 : 4 * i + length + 1] != numbers[4 * i : 4 * i + length]
        expected = text[4 * i + 1 : 4 * i + length + 1].masked_fill(begins, -100).tolist()
        assert targets.tolist() == expected + [-100] * (4 - length)
    (ids, seq_idx), targets = ByteWindows(files, 4)[1]
    assert not seq_idx.any() and targets.equal(text[5:9])
    shifted = {ByteWindows(files, 4)[seed, 1][0][0][0].item() for seed in range(1, 50)}
    assert shifted == set(text[4:8].tolist())


def test_data_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='no file or folder'):
        ByteFiles.find(tmp_path / 'absent')
    with pytest.raises(ValueError, match='there are no bytes in'):
        ByteFiles.find(tmp_path)
    (tmp_path / 'one').write_bytes(b'1')
    with pytest.raises(ValueError, match='at least two bytes are needed, found 1'):
        ByteWindows(ByteFiles.find(tmp_path), 4)
    with pytest.raises(ValueError, match='cannot be divided by 0.1'):
        ByteFiles.find(tmp_path).hold_out(0.1)


@torch.no_grad()
@pytest.mark.parametrize('length', [2, 7, 8, 30, 31])
def test_bits_per_byte_follow_their_definition(length):
    model = make('mamba', vocab_size=256).double()
    ids = torch.randint(256, (length,))

    def bits(t, first):
        return -torch.log_softmax(model(ids[None, first:t]).double(), dim=-1)[0, -1, ids[t]].item() / math.log(2)

    for window, stride in ((7, 7), (7, 2), (7, 1), (40, 40)):
        expected = 0.0
        for t in range(1, length):  # the first window that predicts t
            start = max(math.ceil((t - window) / stride), 0) * stride
            expected += bits(t, start)
        found = bits_per_byte(model, ids.to(torch.uint8), window, stride, batch_size=3)
        assert abs(found - expected / (length - 1)) < 1e-5
    carried = bits_per_byte(model, ids, 7, carry_state=True)
    assert abs(carried - sum(bits(t, 0) for t in range(1, length)) / (length - 1)) < 1e-5


def test_wrong_options_of_bits_per_byte():
    model, ids = make(vocab_size=256), torch.zeros(9)
    for wrong, message in (
        (dict(stride=9), 'stride must be at most window, 8'),
        (dict(stride=2, carry_state=True), 'not given with carry_state; got 2'),
        (dict(stride=0), 'stride must be an integer of at least 1, got 0'),
        (dict(ids=ids[:1]), r'at least two bytes, got \(1,\)'),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_byte(**{**dict(model=model, ids=ids, window=8), **wrong})


PARAMETERS = {
    'mamba_370m': 371_516_416,
    'mamba_790m': 793_204_224,
    'mamba_1.4b': 1_372_178_432,
    'mamba2_370m': 368_346_624,
    'mamba2_780m': 780_161_280,
    'mamba2_1.3b': 1_343_757_312,
    'mamba2_2.7b': 2_702_599_680,
    'mambabyte_353m': 353.9e6,
    'mambabyte_972m': 973.9e6,
    'mambabyte_1.6b': 1606.1e6,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_sizes_of_presets(name):
    model = create_language_model(name, device='meta')
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == PARAMETERS[name] or (name.startswith('mambabyte') and round(found / 1e5) * 1e5 == PARAMETERS[name])


def test_unknown_presets():
    with pytest.raises(ValueError, match="no language model 'mamba_130'; did you mean mamba_130m"):
        create_language_model('mamba_130')
    assert create_language_model('mambabyte_nano', n_layer=1).config['n_layer'] == 1 and len(PRESETS) == 16
