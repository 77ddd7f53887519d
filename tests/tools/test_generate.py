"""`vmamba generate` and `vmamba bits-per-byte` on small models with random weights."""

import sys

import pytest
import torch

from vmamba.sequence import ByteFiles, bits_per_byte, create_language_model
from vmamba.tools import evaluate_bytes, generate


@pytest.fixture
def model(tmp_path):
    model = create_language_model('mambabyte_nano', d_model=16, n_layer=2).eval()
    model.save_pretrained(tmp_path / 'model')
    return model, tmp_path / 'model'


@pytest.fixture
def run(capsys):
    def call(*args, tool=generate):
        code = 0
        try:
            tool.main([str(arg) for arg in (*args, '--device', 'cpu')])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_bytes_are_printed_as_they_come(model, run):
    ids = model[0].generate(torch.tensor([list('Grüße'.encode())]), 30, top_k=1)
    expected = bytes(ids[0].tolist()).decode('utf-8', errors='replace')
    code, out, _ = run('--model', model[1], '--prompt', 'Grüße', '--max-new-tokens', 30, '--temperature', 0)
    assert code == 0 and out.rstrip('\n') == expected.rstrip('\ufffd\n')
    again = [run('--model', model[1], '--prompt', 'a', '--seed', seed)[1] for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_drafts_change_nothing(model, run, tmp_path):
    create_language_model('mambabyte_nano', d_model=8, n_layer=1).save_pretrained(tmp_path / 'small')
    (tmp_path / 'prompt').write_bytes(b'abc')
    options = '--model', model[1], '--prompt-file', tmp_path / 'prompt', '--only-new', '--max-new-tokens', 20
    assert run(*options, '--draft', tmp_path / 'small') == run(*options, '--top-k', 1)


def test_a_tokenizer_of_transformers(run, tmp_path, monkeypatch):
    """By a stand-in, whose tokens are the letters from a on."""

    class Letters:
        eos_token_id = 25

        @classmethod
        def from_pretrained(cls, folder):
            return cls()

        def encode(self, text):
            return [ord(letter) - 97 for letter in text]

        def decode(self, ids):
            return ''.join(chr(97 + id) for id in ids)

    monkeypatch.setitem(sys.modules, 'transformers', type('module', (), {'AutoTokenizer': Letters}))
    model = create_language_model('mamba_130m', d_model=16, n_layer=2, vocab_size=26).eval()
    model.save_pretrained(tmp_path)
    ids = model.generate(torch.tensor([[7, 8]]), 30, top_k=1, eos_token_id=25)
    expected = Letters().decode(ids[0].tolist())
    options = '--model', tmp_path, '--prompt', 'hi', '--top-k', 1, '--max-new-tokens', 30
    assert run(*options, '--tokenizer', 'letters')[1].strip() == expected
    assert 'has no tokenizer: give --tokenizer FOLDER' in run(*options)[2]
    (tmp_path / 'tokenizer_config.json').write_text('{}')
    assert run(*options)[1].strip() == expected


def test_bits_per_byte_of_a_file(model, run, tmp_path):
    (tmp_path / 'text').write_bytes(bytes(range(100)))
    ids, _ = ByteFiles.find(tmp_path / 'text').read(0, 100)
    for options, expected in (
        (('--stride', 4), bits_per_byte(model[0], ids, 16, 4)),
        (('--carry-state',), bits_per_byte(model[0], ids, 16, carry_state=True)),
    ):
        args = '--model', model[1], '--data', tmp_path / 'text', '--window', 16, *options
        assert run(*args, tool=evaluate_bytes)[1] == f'{expected:.4f} bits per byte, 100 bytes of 1 file(s)\n'


def test_errors_are_one_line(model, run, tmp_path):
    for options, message in (
        (('--model', tmp_path / 'no', '--prompt', 'a'), 'is neither a folder nor the id of a model'),
        (('--model', model[1], '--prompt', ''), 'the prompt is empty'),
        (('--model', model[1], '--prompt-file', tmp_path / 'no'), f'there is no {tmp_path / "no"}'),
        (('--model', model[1], '--prompt', 'a', '--top-p', 2), 'top_p must be between 0 and 1, got 2.0'),
        (('--model', model[1], '--prompt', 'a', '--max-new-tokens', 0), 'must be a whole number above 0'),
        (
            ('--model', model[1], '--prompt', 'a', '--draft', model[1], '--temperature', 0.5),
            '--draft always takes the most probable token: leave out the options of sampling',
        ),
    ):
        code, out, err = run(*options)
        assert code == 2 and not out and message in err.splitlines()[-1]
