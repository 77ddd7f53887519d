"""linear_recurrence_ against a plain loop, for even and odd numbers of steps, walked or reduced."""

import oracles
import pytest
import torch
from vmamba.kernels import recurrence


def walk(decay, value, state, reverse):
    out = torch.empty_like(value)
    steps = range(value.shape[1])
    for step in reversed(steps) if reverse else steps:
        state = decay[:, step] * state + value[:, step]
        out[:, step] = state
    return out


def linear_recurrence_(decay, value, state, reverse, keep_decay=True):
    products = torch.empty_like(decay) if keep_decay else decay
    recurrence.linear_recurrence_(decay, value, state, products, reverse)
    return value


def inputs(batch, steps, width, dtype=torch.float64):
    decay = torch.rand(batch, steps, width, dtype=dtype)
    return decay, torch.randn(batch, steps, width, dtype=dtype), torch.randn(batch, width, dtype=dtype)


@pytest.mark.parametrize('keep_decay', [True, False], ids=['keep', 'overwrite'])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('width', [1, 5, 129])
@pytest.mark.parametrize('steps', [1, 2, 7, 8, 9, 15, 16, 17, 63, 100, 1023])
def test_agrees_with_a_loop(steps, width, reverse, keep_decay):
    decay, value, state = inputs(2, steps, width)
    expected = walk(decay, value, state, reverse)
    oracles.assert_matches(linear_recurrence_(decay, value, state, reverse, keep_decay), expected, torch.float64)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('wide', [1, 7, 10**6])
@pytest.mark.parametrize('few', [1, 2, 8, 100])
@pytest.mark.parametrize('steps', [1, 2, 3, 8, 13, 50, 77])
def test_the_thresholds_do_not_matter(monkeypatch, steps, few, wide, reverse):
    monkeypatch.setattr(recurrence, '_WIDE_STEP', wide)
    monkeypatch.setattr(recurrence, '_FEW_STEPS', few)
    decay, value, state = inputs(2, steps, 3)
    expected = walk(decay, value, state, reverse)
    oracles.assert_matches(linear_recurrence_(decay, value, state, reverse), expected, torch.float64)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_what_is_not_overwritten_is_left_alone(reverse):
    decay, value, state = inputs(2, 77, 3)
    copies = decay.clone(), state.clone()
    linear_recurrence_(decay, value, state, reverse)
    assert torch.equal(decay, copies[0])
    assert torch.equal(state, copies[1])


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_views_are_walked_in_place(reverse):
    """Slices of larger buffers, as the scan passes them; their surroundings stay."""
    decay, value, state = inputs(2, 40, 6)
    buffer = torch.full((2, 42, 6), 7.0, dtype=torch.float64)
    buffer[:, 1:-1] = value
    linear_recurrence_(decay, buffer[:, 1:-1], state, reverse)
    oracles.assert_matches(buffer[:, 1:-1], walk(decay, value, state, reverse), torch.float64)
    assert (buffer[:, [0, -1]] == 7).all()


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('decay', [0.0, 1.0, 1e-200], ids=['nothing-kept', 'all-kept', 'underflow'])
def test_extreme_decays(decay, reverse):
    _, value, state = inputs(1, 101, 2)
    decays = torch.full_like(value, decay)
    expected = walk(decays, value, state, reverse)
    oracles.assert_matches(linear_recurrence_(decays, value, state, reverse), expected, torch.float64)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('batch,steps,width', [(0, 33, 3), (2, 33, 0)])
def test_nothing_to_walk(batch, steps, width, reverse):
    decay, value, state = inputs(batch, steps, width)
    assert linear_recurrence_(decay, value, state, reverse).shape == (batch, steps, width)


@pytest.mark.parametrize('batch', [0, 1, 5, 64])
@pytest.mark.parametrize('steps,width', [(1, 7), (129, 12), (512, 12), (1000, 601), (1037, 0), (1037, 2**22)])
def test_a_recurrence_is_cut_into_bounded_blocks(monkeypatch, batch, steps, width):
    """Blocks cover batch and sequence in order and hold few elements, but not less than eight steps of one entry."""
    monkeypatch.setattr(recurrence, '_BLOCK_ELEMENTS', 600)
    monkeypatch.setattr(recurrence, '_BLOCK_WIDTH', 50)
    rows, parts = recurrence.blocks(batch, steps, width)
    assert [i for part in rows for i in range(batch)[part]] == list(range(batch))
    assert [i for part in parts for i in range(steps)[part]] == list(range(steps))
    entries = max((part.stop - part.start for part in rows), default=0)
    longest = max(part.stop - part.start for part in parts)
    assert entries * width <= max(50, width)
    assert entries * longest * width <= max(600, 8 * entries * width)
