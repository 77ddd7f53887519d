"""The selective scan of plain PyTorch: its recurrence, how it cuts its work, and the memory that it keeps."""

from concurrent.futures import ThreadPoolExecutor

import oracles
import pytest
import torch
from kernel_cases import CASES, assert_equal, in_double, run, ss2d_scan
from kernel_cases import selective_scan as arguments_of

from vmamba.kernels import chunked

SCAN = CASES['selective_scan']

both_ways = pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])


def arguments(**changes):
    """Of a scan on the CPU."""
    return {k: None if t is None else t.cpu() for k, t in arguments_of(**changes).items()}


def scan(tensors, **options):
    """Results and gradients."""
    return run(SCAN.function, tensors, **{**SCAN.options, **options})


def compare_in_double(tensors, **options):
    expected = run(SCAN.definition, in_double(tensors), **{**SCAN.options, **options})
    oracles.assert_all_match(scan(tensors, **options), expected, torch.float64)


# --- the recurrence


def walk(decay, value, state, reverse):
    out = torch.empty_like(value)
    steps = range(value.shape[1])
    for step in reversed(steps) if reverse else steps:
        state = decay[:, step] * state + value[:, step]
        out[:, step] = state
    return out


def recurrence(decay, value, state, reverse=False, grows=False, keep_decay=True):
    products = torch.empty_like(decay) if keep_decay else decay
    chunked.linear_recurrence_(decay, value, state, products, grows, reverse)
    return value


def inputs(batch, steps, width):
    """Decays, what comes in, and the state before the first step."""
    dtype = torch.float64
    return (
        torch.rand(batch, steps, width, dtype=dtype),
        torch.randn(batch, steps, width, dtype=dtype),
        torch.randn(batch, width, dtype=dtype),
    )


@pytest.mark.parametrize('keep_decay', [True, False], ids=['keep', 'overwrite'])
@both_ways
@pytest.mark.parametrize('width', [1, 5, 129])
@pytest.mark.parametrize('steps', [1, 2, 7, 8, 9, 15, 16, 17, 63, 100, 1023])
def test_the_recurrence_agrees_with_a_loop(steps, width, reverse, keep_decay):
    decay, value, state = inputs(2, steps, width)
    expected = walk(decay, value, state, reverse)
    actual = recurrence(decay, value, state, reverse, keep_decay=keep_decay)
    oracles.assert_matches(actual, expected, torch.float64)


@both_ways
@pytest.mark.parametrize('wide', [1, 7, 10**6])
@pytest.mark.parametrize('few', [1, 2, 8, 100])
@pytest.mark.parametrize('steps', [1, 2, 3, 8, 13, 50, 77])
def test_the_recurrence_agrees_whatever_is_walked_and_reduced(monkeypatch, steps, few, wide, reverse):
    monkeypatch.setattr(chunked, '_WIDE_STEP', wide)
    monkeypatch.setattr(chunked, '_FEW_STEPS', few)
    decay, value, state = inputs(2, steps, 3)
    expected = walk(decay, value, state, reverse)
    oracles.assert_matches(recurrence(decay, value, state, reverse), expected, torch.float64)


@both_ways
@pytest.mark.parametrize('grows', [False, True])
def test_what_the_recurrence_does_not_overwrite_is_left_alone(grows, reverse):
    decay, value, state = inputs(2, 77, 3)
    copies = decay.clone(), state.clone()
    recurrence(decay, value, state, reverse, grows)
    assert torch.equal(decay, copies[0]) and torch.equal(state, copies[1])


@both_ways
def test_the_recurrence_stays_within_a_view(reverse):
    """Slices of larger buffers, as the scan passes them."""
    decay, value, state = inputs(2, 40, 6)
    buffer = torch.full((2, 42, 6), 7.0, dtype=torch.float64)
    buffer[:, 1:-1] = value
    recurrence(decay, buffer[:, 1:-1], state, reverse)
    oracles.assert_matches(buffer[:, 1:-1], walk(decay, value, state, reverse), torch.float64)
    assert (buffer[:, [0, -1]] == 7).all()


@both_ways
@pytest.mark.parametrize('decay', [0.0, 1.0, 1e-200], ids=['nothing-kept', 'all-kept', 'underflow'])
def test_extreme_decays(decay, reverse):
    _, value, state = inputs(1, 101, 2)
    decays = torch.full_like(value, decay)
    expected = walk(decays, value, state, reverse)
    oracles.assert_matches(recurrence(decays, value, state, reverse), expected, torch.float64)


@both_ways
def test_decays_that_grow_are_walked(reverse):
    """Bit by bit as by a loop, and without products that would make a NaN of a zero."""
    decay, value, state = inputs(2, 60, 3)
    decay = 100 + 1e6 * decay
    expected = torch.empty_like(value)
    for step in range(59, -1, -1) if reverse else range(60):
        before = state if step == (59 if reverse else 0) else expected[:, step + 1 if reverse else step - 1]
        expected[:, step] = torch.addcmul(value[:, step], decay[:, step], before)
    assert torch.equal(recurrence(decay, value, state, reverse, grows=True), expected)
    zeros = torch.zeros_like(value)
    assert not recurrence(decay, zeros, torch.zeros_like(state), reverse, grows=True).any()


@both_ways
def test_decays_of_which_it_is_not_known_whether_they_grow(reverse):
    """As on other devices than a CPU: they are reduced, and make no NaN of a zero either."""
    decay, value, state = inputs(2, 60, 3)
    expected = walk(2 * decay, value, state, reverse)
    oracles.assert_matches(recurrence(2 * decay, value, state, reverse, grows=None), expected, torch.float64)
    zeros = torch.zeros_like(value)
    assert not recurrence(1e100 + decay, zeros, torch.zeros_like(state), reverse, grows=None).any()
    ones = torch.ones(1, device='meta')
    assert chunked._grows(ones, chunked.GivenSteps(ones), False) is None


@pytest.mark.parametrize(
    'A,delta,softplus,expected',
    [
        (-1.0, 1.0, False, False),
        (-1.0, 0.0, False, False),
        (-1.0, -1.0, False, True),
        (-1.0, -1.0, True, False),
        (1.0, 1.0, False, True),
        (1.0, -1.0, True, True),
        (-1.0, float('nan'), False, True),
    ],
)
def test_decays_may_grow_by_the_sign_of_A_or_of_a_step(A, delta, softplus, expected):
    """One is enough."""
    rates, steps = -torch.ones(2, 3, 4), torch.ones(1, 5, 2, 4)
    rates[1, 2, 3], steps[0, 4, 1, 3] = A, delta
    assert chunked._grows(rates, chunked.GivenSteps(steps), softplus) is expected


@both_ways
@pytest.mark.parametrize('batch,steps,width', [(0, 33, 3), (2, 33, 0)])
def test_nothing_to_walk(batch, steps, width, reverse):
    decay, value, state = inputs(batch, steps, width)
    assert recurrence(decay, value, state, reverse).shape == (batch, steps, width)


def test_softplus_is_exact_for_small_and_large_numbers():
    x = torch.tensor([-700, -100, -30, -1e-9, 0, 1e-9, 1, 19.9, 20.1, 700], dtype=torch.float64)
    torch.testing.assert_close(chunked.softplus(x), oracles.softplus(x), rtol=1e-14, atol=0)
    x = torch.tensor([-80.0, -20.0, 80.0])
    torch.testing.assert_close(chunked.softplus(x).double(), oracles.softplus(x.double()), rtol=1e-6, atol=0)


# --- pieces of a scan


@pytest.mark.parametrize('batch', [0, 1, 5, 64])
@pytest.mark.parametrize('steps,width', [(1, 7), (129, 12), (512, 12), (1000, 601), (1037, 0), (1037, 2**22)])
def test_a_scan_is_cut_into_pieces_of_bounded_memory(monkeypatch, batch, steps, width):
    """They cover batch and sequence in order and hold few elements, but not less than eight steps of one entry."""
    monkeypatch.setattr(chunked, '_CHUNK_ELEMENTS', 600)
    monkeypatch.setattr(chunked, '_CHUNK_WIDTH', 50)
    rows, parts = chunked._cut(batch, steps, width)
    assert [i for part in rows for i in range(batch)[part]] == list(range(batch))
    assert [i for part in parts for i in range(steps)[part]] == list(range(steps))
    entries = max((part.stop - part.start for part in rows), default=0)
    longest = max(part.stop - part.start for part in parts)
    assert entries * width <= max(50, width)
    assert entries * longest * width <= max(600, 8 * entries * width)


@both_ways
@pytest.mark.parametrize('elements', [1, 90, 700], ids='pieces-of-{}'.format)
@pytest.mark.parametrize('wide', [1, 2**14], ids=['walked', 'reduced'])
@pytest.mark.parametrize('seqlen', [1, 8, 9, 77])
def test_pieces_of_any_size_agree(monkeypatch, elements, wide, seqlen, reverse):
    monkeypatch.setattr(chunked, '_CHUNK_ELEMENTS', elements)
    monkeypatch.setattr(chunked, '_CHUNK_WIDTH', max(elements // 8, 1))
    monkeypatch.setattr(chunked, '_WIDE_STEP', wide)
    compare_in_double(arguments(seqlen=seqlen, dim=4, dtype=torch.float64), reverse=reverse)


@pytest.mark.parametrize('sizes', [dict(dim=256, dstate=8), dict(dim=2048, dstate=1)], ids=str)
def test_wide_states_agree(sizes):
    """Sums over their states and channels are products of matrices."""
    compare_in_double(arguments(batch=1, seqlen=4, B=0, C=0, dtype=torch.float64, **sizes))


# --- memory that is kept between calls


def test_memory_is_kept_by_slot_dtype_and_thread():
    like = torch.empty(1)
    first = chunked.scratch('a slot', like, (3, 50))
    assert first.shape == (3, 50) and first.is_contiguous()
    address = first.data_ptr()
    assert chunked.scratch('a slot', like, (2, 5)).data_ptr() == address
    assert chunked.scratch('another slot', like, (2, 5)).data_ptr() != address
    assert chunked.scratch('a slot', like.double(), (2, 5)).data_ptr() != address
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: chunked.scratch('a slot', like, (2, 5)).data_ptr()).result() != address


def test_much_memory_is_not_kept():
    like, limit = torch.empty(1, dtype=torch.float64), chunked._SCRATCH_BYTES // 8
    kept, large = (chunked.scratch('a large slot', like, (size,)).data_ptr() for size in (limit, limit + 1))
    assert large != kept and chunked.scratch('a large slot', like, (limit,)).data_ptr() == kept
    assert chunked.scratch('a large slot', torch.empty(1, device='meta'), (3,)).is_meta
    del chunked._scratch.__dict__['a large slot torch.float64']


@pytest.mark.parametrize('seqlen', [5, 301])
def test_results_survive_the_next_call(seqlen):
    first = scan(arguments(seqlen=seqlen))
    copies = {k: t.clone() for k, t in first.items()}
    scan(arguments(seqlen=seqlen))
    scan(arguments(seqlen=2 * seqlen, dstate=16))
    assert_equal(first, copies)


def test_results_do_not_depend_on_what_ran_before():
    tensors = arguments(seqlen=77)
    first = scan(tensors)
    for size in (3, 500, 76):
        other = arguments(seqlen=size)
        other['u'] = torch.full_like(other['u'], float('nan'))
        scan(other)
        assert_equal(scan(tensors), first)


def test_a_backward_pass_may_come_after_other_calls():
    tensors = arguments(seqlen=77)

    def interrupted(**given):
        results = SCAN.function(**given)
        scan(arguments(seqlen=300))
        return results

    assert_equal(run(interrupted, tensors, **SCAN.options), scan(tensors))


def test_threads_do_not_share_memory():
    cases = [arguments(batch=1, dim=8, seqlen=400 + i) for i in range(4)]
    expected = [scan(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, single in zip(pool.map(scan, cases), expected, strict=True):
                assert_equal(results, single)


@pytest.mark.parametrize('first', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_can_follow_each_other(first):
    """In a thread of its own, which has kept nothing yet."""

    def modes():
        tensors = arguments(seqlen=63)
        with first():
            before = SCAN.function(**tensors, **SCAN.options)[0].clone()
        results = scan(tensors)
        with torch.inference_mode():
            after = SCAN.function(**tensors, **SCAN.options)[0]
        return torch.equal(before, results['result_0']) and torch.equal(after, results['result_0'])

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(modes).result()


def test_scans_of_maps_take_turns():
    """Forward, forward, backward, backward."""
    cases = [{k: t.cpu().requires_grad_() for k, t in ss2d_scan().items()} for _ in range(2)]

    def forward(tensors):
        return CASES['ss2d_scan'].function(**tensors).square().sum()

    def backward(loss, tensors):
        return torch.autograd.grad(loss, list(tensors.values()))

    alone = [backward(forward(tensors), tensors) for tensors in cases]
    losses = [forward(tensors) for tensors in cases]
    together = [backward(loss, tensors) for loss, tensors in zip(losses, cases)]
    assert all(torch.equal(a, b) for one, other in zip(alone, together) for a, b in zip(one, other))
