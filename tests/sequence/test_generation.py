"""Generation against the whole sequence passed for every token, and the filters against their definitions."""

import math

import pytest
import torch
from cases import needs_gpu
from models import KINDS, VOCAB, draw, make

from vmamba.sequence import Sampling, generation, sample


def greedy(model, ids, tokens):
    """Without caches."""
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids)[:, -1, :VOCAB].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_the_most_probable_tokens(kind):
    model, ids = make(kind).double(), draw(2, 5)
    expected = greedy(model, ids, 9)
    assert torch.equal(model.generate(ids, 9, top_k=1), expected)
    assert torch.equal(model.generate(ids.int(), 9, temperature=0), expected)
    assert torch.equal(model.generate(ids, 0), ids)


def test_a_model_in_training_generates_in_evaluation_mode():
    model, modes = make().train(), []
    model.register_forward_hook(lambda *args: modes.append(model.training))
    model.generate(draw(1, 2), 2)
    with pytest.raises(ValueError, match='max_new_tokens'):
        model.generate(draw(1, 2), -1)
    assert modes == [False] and model.training and all(module.training for module in model.modules())
    part = model.backbone.layers[0].eval()
    model.generate(draw(1, 2), 2)
    assert model.training and not part.training


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    model, ids = make(kind).double(), draw(4, 7)
    lengths = [3, 7, 1, 3]
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths])
    ids = ids.masked_fill(~mask, VOCAB + 1)  # even of what is no token
    tokens = []
    out = model.generate(ids, 8, top_k=1, attention_mask=mask.long(), callback=lambda token: tokens.append(token))
    assert torch.equal(torch.stack(tokens, dim=1), out[:, 7:])
    for row, length in enumerate(lengths):
        assert torch.equal(out[row, 7 - length :], greedy(model, ids[row : row + 1, 7 - length :], 8)[0])


@torch.no_grad()
def test_rows_end_with_eos():
    model, ids = make().double(), draw(3, 4)
    free = greedy(model, ids, 40)
    eos = int(free[0, 9])
    ends = [(row[4:] == eos).nonzero().flatten().tolist() for row in free]
    out = model.generate(ids, 40, top_k=1, eos_token_id=eos)
    longest = max(end[0] + 1 if end else 40 for end in ends)
    assert out.shape[1] == 4 + longest
    for row, end in enumerate(ends):
        kept = 4 + (end[0] + 1 if end else 40)
        assert torch.equal(out[row, :kept], free[row, :kept]) and (out[row, kept:] == eos).all()
    first = model.generate(ids[:1], 40, top_k=1, eos_token_id=eos)
    assert first.shape[1] == 4 + ends[0][0] + 1


def kept(sampling, logits, draws=3000):
    """Frequencies of sampled tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = sample(logits.expand(draws, -1), sampling, generator=generator)
    return torch.bincount(ids, minlength=logits.shape[-1]) / draws


P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ('sampling', 'expected'),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2),
        (Sampling(top_k=2), [0, 0.4, 0, 0.25, 0]),
        (Sampling(top_p=0.6), [0, 0.4, 0, 0.25, 0]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(min_p=0.45), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_k=3, temperature=2, top_p=0.6), [0, 0.4**0.5, 0, 0.25**0.5, 0]),
        (Sampling(top_k=1, temperature=5), [0, 1, 0, 0, 0]),
    ],
    ids=['all', 'temperature', 'top-k', 'top-p', 'top-p-of-one', 'min-p', 'in-order', 'greedy'],
)
def test_filters(sampling, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    found = kept(sampling, P.log())
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.03, rtol=0)


def test_tokens_that_were_there_are_penalised():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    seen = torch.tensor([[True, False, False, False]])
    assert sample(logits, Sampling(2.0, top_k=1), seen) == 1
    assert sample(logits - 2.1, Sampling(2.0, top_k=1), ~seen) == 0
    model, ids = make().double(), draw(1, 3)
    strong = model.generate(ids, 30, top_k=1, repetition_penalty=1e9)[0].tolist()
    assert len(set(strong[3:])) == 30 and not set(strong[3:]) & set(strong[:3])


def test_padding_of_the_vocabulary_is_never_sampled():
    model = make(tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:VOCAB] = 0
        model.lm_head.weight[VOCAB:] = 100 * model.backbone.norm_f.weight.sign()
    out = model.generate(draw(20, 2), 20, temperature=10.0)
    assert out.max() < VOCAB
    assert torch.equal(*(model.generate(out[:2], 5, generator=torch.Generator().manual_seed(7)) for _ in range(2)))


@pytest.mark.parametrize('kind', ['mamba', 'mamba2', 's4d-h3'])
def test_caches_do_not_grow(kind):
    model = make(kind)

    def elements(tokens):
        cache = model.allocate_cache(2, tokens)
        model.generate(draw(2, 3), tokens, top_k=1)
        return sum(tensor.numel() for own in cache for tensor in own)

    assert elements(3) == elements(60)


def test_wrong_arguments(monkeypatch):
    model, ids = make('attention'), draw(2, 4)
    cases = [
        (dict(ids=ids[:, :0]), r'at least one token, got \(2, 0\)'),
        (dict(ids=ids + VOCAB), 'ids must be from 0 to 52, got'),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 0]] * 2)), 'pad the prompts on the left'),
        (dict(attention_mask=torch.tensor([[0] * 4, [1] * 4])), 'row 0 of attention_mask is all zeros'),
        (dict(attention_mask=torch.ones(2, 3)), r'attention_mask must be \(2, 4\) like ids, got \(2, 3\)'),
        (dict(max_new_tokens=-1), 'max_new_tokens must be an integer of at least 0, got -1'),
        (dict(temperature=-1.0), 'temperature must be at least 0'),
        (dict(temperature=math.nan), 'temperature must be at least 0'),
        (dict(top_k=1.5), 'top_k must be an integer of at least 0, got 1.5'),
        (dict(top_p=1.5), 'top_p must be between 0 and 1, got 1.5'),
        (dict(min_p=-0.1), 'min_p must be between 0 and 1'),
        (dict(repetition_penalty=0), 'repetition_penalty must be above 0'),
        (dict(eos_token_id=VOCAB), 'eos_token_id must be below 53, got 53'),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(**{**dict(ids=ids, max_new_tokens=2), **wrong})
    with pytest.raises(
        MemoryError, match='caches of 2 sequences of up to 1000000000000004 tokens do not fit in memory'
    ):
        model.generate(ids, 10**15)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('kind', KINDS)
def test_a_graph_of_the_step_generates_the_same(kind):
    model, ids = make(kind).cuda(), draw(3, 5).cuda()
    assert torch.equal(*(model.generate(ids, 20, top_k=1, cuda_graph=graph) for graph in (True, False)))
    mask = torch.tensor([[1] * 5, [0] * 4 + [1], [0, 0, 1, 1, 1]])
    padded = [model.generate(ids, 20, top_k=1, attention_mask=mask, cuda_graph=graph) for graph in (True, False)]
    assert torch.equal(*padded) and generation._MIN_GRAPH_STEPS < 20
