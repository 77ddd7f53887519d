"""Speculative decoding against plain decoding."""

import pytest
import torch
from models import KINDS, draw, make

from vmamba.sequence import speculative, speculative_generate


def noisy(model, amount):
    """A copy that mostly agrees."""
    copy = type(model)(**model.config).double().eval()
    copy.load_state_dict({key: value + amount * torch.randn_like(value) for key, value in model.state_dict().items()})
    return copy


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('amount', [0, 0.02, 1.0], ids=['same', 'near', 'far'])
def test_greedy_acceptance_is_plain_decoding(kind, amount, monkeypatch):
    monkeypatch.setattr(speculative, '_MOST_PENDING', 6)
    model, ids = make(kind).double(), draw(1, 4)
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    expected = model.generate(ids, 40, top_k=1)
    passes.clear()
    parts = []
    out = speculative_generate(model, noisy(model, amount), ids, 40, draft_tokens=4, callback=parts.append)
    assert torch.equal(out, expected) and torch.equal(torch.cat(parts, dim=1), expected[:, 4:])
    assert len(passes) == 9 if amount == 0 else len(passes) <= 50


def test_acceptance_of_probable_tokens():
    """Of any of them the whole draft is taken: the text is the drafter's, with the model's own after every draft."""
    model, ids = make().double(), draw(1, 1)
    drafter = noisy(model, 1.0)
    out = speculative_generate(model, drafter, ids, 6, draft_tokens=2, accept_top=model.vocab_size)
    expected = ids
    for source in (drafter, drafter, model) * 2:
        expected = source.generate(expected, 1, top_k=1)
    assert torch.equal(out, expected)


class Pairs:
    """A tokenizer of two characters to a token."""

    def encode(self, text):
        return [ord(a) % 50 for a in text[::2]]

    def decode(self, ids):
        return ''.join(chr(97 + i % 26) + '\u00e4' for i in ids)


def test_a_drafter_with_a_vocabulary_of_its_own():
    model, drafter = make(vocab_size=256).double(), make('mamba2').double()
    ids = torch.tensor([list('Grüße'.encode())])
    expected = model.generate(ids, 25, top_k=1)
    assert torch.equal(speculative_generate(model, drafter, ids, 25, tokenizer=Pairs()), expected)


def test_a_token_of_many_bytes_near_the_end():
    """What it decodes to beyond the end needs no room among the keys."""

    class Long(Pairs):
        def decode(self, ids):
            return 'x' * 90

    model, drafter = make('attention', vocab_size=256), make()
    ids = torch.tensor([list(b'abcd')])
    expected = model.generate(ids, 3, top_k=1)
    assert torch.equal(speculative_generate(model, drafter, ids, 3, tokenizer=Long()), expected)


def test_wrong_arguments():
    model = make()
    with pytest.raises(ValueError, match='one prompt is needed, got 2'):
        speculative_generate(model, model, draw(2, 3), 5)
    with pytest.raises(ValueError, match='the vocabulary must be that of bytes, 256 tokens, got 53'):
        speculative_generate(model, model, draw(1, 3), 5, tokenizer=Pairs())
    with pytest.raises(ValueError, match='draft_tokens must be an integer of at least 1, got 0'):
        speculative_generate(model, model, draw(1, 3), 5, draft_tokens=0)
    with pytest.raises(ValueError, match='ids must be from 0 to 52, got 60'):
        speculative_generate(model, model, torch.tensor([[60]]), 5)
