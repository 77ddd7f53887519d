"""selective_scan against a float64 loop: outputs, states and every gradient."""

import oracles
import pytest
import torch
from vmamba.kernels import reference, selective_scan

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'initial_state')


def arguments(batch=2, dim=6, seqlen=37, dstate=3, B=2, C=2, share=1, optional='Dzbs', dtype=torch.float64, steps=None):
    """Arguments by name, absent ones None.

    Args:
        B, C: Number of groups; 0 for [batch, N, L], None for constants [D, N].
        share: Channels that share a step size.
        optional: Letters of the optional arguments that are given: D, z, delta_bias (b), initial_state (s).
        dtype: Dtype of the sequences; the others are in fp32, or fp64 with it.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def projection(groups):
        if groups is None:
            return torch.randn(dim, dstate, dtype=torch.float64).to(wide)
        shape = (batch, groups, dstate, seqlen) if groups else (batch, dstate, seqlen)
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    tensors = {
        'u': torch.randn(batch, dim, seqlen, dtype=torch.float64).to(dtype),
        'delta': (torch.rand(batch, dim // share, seqlen, dtype=torch.float64) * (steps or 0.5)).to(dtype),
        'A': -torch.rand(dim, dstate, dtype=torch.float64).to(wide) * 2,
        'B': projection(B),
        'C': projection(C),
        'D': torch.randn(dim, dtype=torch.float64).to(wide) if 'D' in optional else None,
        'z': torch.randn(batch, dim, seqlen, dtype=torch.float64).to(dtype) if 'z' in optional else None,
        'delta_bias': torch.rand(dim, dtype=torch.float64).to(wide) - 0.5 if 'b' in optional else None,
        'initial_state': torch.randn(batch, dim, dstate, dtype=torch.float64).to(wide) if 's' in optional else None,
    }
    assert tuple(tensors) == NAMES
    return tensors


def run(function, tensors, **options):
    """Output, last state and the gradients of a random combination of both, by name."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y, state = function(**leaves, **options)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64) for t in (y, state)]
    # Rounding the weights as the output is rounded leaves nothing for the comparison to differ in.
    weights = [w.to(torch.bfloat16) for w in weights]
    torch.autograd.backward((y, state), [w.to(t) for w, t in zip(weights, (y, state))])
    return {'y': y, 'last_state': state, **{f'grad_{k}': None if t is None else t.grad for k, t in leaves.items()}}


def library(**tensors):
    return selective_scan(**tensors, return_last_state=True)


def doubled(tensors):
    return {k: None if t is None else t.double() for k, t in tensors.items()}


def compare(tensors, dtype, **options):
    expected = run(oracles.selective_scan, doubled(tensors), **options)
    oracles.assert_all_match(run(library, tensors, **options), expected, dtype)


SHAPES = [
    pytest.param(dict(seqlen=1), id='one-step'),
    pytest.param(dict(seqlen=2, dim=1, B=0, C=0), id='two-steps-one-channel'),
    pytest.param(dict(seqlen=63, dstate=1, B=1, C=1), id='63-n1'),
    pytest.param(dict(seqlen=151, dstate=16, B=0, C=0), id='151-n16'),
    pytest.param(dict(seqlen=1023, dim=2, batch=1, dstate=1, B=0, C=1), id='1023-n1'),
    pytest.param(dict(batch=1, dim=10, B=2, C=1), id='different-groups'),
    pytest.param(dict(B=None, C=None), id='constant-b-and-c'),
    pytest.param(dict(B=None, C=2), id='constant-b'),
    pytest.param(dict(B=0, C=None, dstate=1), id='constant-c'),
    pytest.param(dict(B=6, C=6, dstate=2), id='group-per-channel'),
    pytest.param(dict(share=3), id='delta-shared-by-3'),
    pytest.param(dict(share=6, B=0, C=0, dstate=1), id='delta-shared-by-all'),
]


@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('sizes', SHAPES)
def test_outputs_and_gradients_in_double(sizes, reverse, softplus):
    compare(arguments(**sizes), torch.float64, delta_softplus=softplus, reverse=reverse)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('optional', ['', 'D', 'z', 'b', 's', 'Dz', 'zb', 'Dbs'])
def test_every_optional_argument(optional, reverse):
    compare(arguments(seqlen=19, optional=optional), torch.float64, delta_softplus='b' in optional, reverse=reverse)


@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
@pytest.mark.parametrize('seqlen,dstate,groups', [(63, 1, 2), (71, 16, 1), (257, 3, 0)])
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_dtypes(dtype, seqlen, dstate, groups, reverse):
    tensors = arguments(seqlen=seqlen, dstate=dstate, B=groups, C=groups, dim=4, dtype=dtype)
    compare(tensors, dtype, delta_softplus=True, reverse=reverse)


@pytest.mark.parametrize('delta,z', [(torch.float32, None), (torch.float32, torch.float32), (None, torch.float32)])
def test_mixed_dtypes(delta, z):
    """As under autocast: bfloat16 sequences beside fp32 ones. The output has u's dtype."""
    tensors = arguments(dtype=torch.bfloat16)
    tensors['delta'] = tensors['delta'].to(delta or torch.bfloat16)
    tensors['z'] = tensors['z'].to(z or torch.bfloat16)
    compare(tensors, torch.bfloat16, delta_softplus=True)
    assert library(**tensors)[0].dtype == torch.bfloat16


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_the_reference_agrees(reverse):
    tensors = doubled(arguments(seqlen=23))
    expected = run(oracles.selective_scan, tensors, reverse=reverse, delta_softplus=True)
    actual = run(reference.selective_scan, tensors, reverse=reverse, delta_softplus=True)
    oracles.assert_all_match(actual, expected, torch.float64)


@pytest.mark.parametrize('case', ['underflow', 'tiny-steps', 'wide-range', 'softplus-threshold', 'zero-steps'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('seqlen', [1, 63, 401])
def test_extreme_steps_and_decays(case, dtype, seqlen):
    tensors = arguments(dim=4, seqlen=seqlen, dtype=dtype, optional='Dzs')
    softplus = False
    if case == 'underflow':  # exp(delta * A) is zero in any dtype
        tensors['delta'] = tensors['delta'] * 100 + 50
        tensors['A'] = tensors['A'] * 1e3 - 100
    elif case == 'tiny-steps':  # the state hardly decays over the whole sequence
        tensors['delta'] = tensors['delta'] * 1e-7
        tensors['A'] = tensors['A'] * 1e-3
    elif case == 'wide-range':  # decays of 1 and of 0 side by side
        tensors['delta'] = 10 ** (tensors['delta'] * 18 - 7)
        tensors['A'] = -(10 ** (-tensors['A'] * 2 - 2))
    elif case == 'softplus-threshold':
        tensors['delta'] = tensors['delta'] * 200 - 50
        softplus = True
    else:
        tensors['delta'] = tensors['delta'] * 0
    results = run(library, tensors, delta_softplus=softplus)
    assert all(t.isfinite().all() for t in results.values() if t is not None)
    compare(tensors, dtype, delta_softplus=softplus)


def test_decays_that_multiply_to_nothing_keep_what_comes_later():
    """The product of the decays of a chunk underflows, while the states inside it do not."""
    tensors = arguments(batch=1, dim=3, seqlen=900, dstate=2, B=0, C=0, optional='s', dtype=torch.float32)
    tensors['delta'] = torch.full_like(tensors['delta'], 4.0)
    tensors['A'] = torch.full_like(tensors['A'], -2.0)
    compare(tensors, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('dstate', [1, 2])
def test_very_long_sequences(dstate, reverse):
    """65,536 steps that remember thousands of them, in fp32 against a plain double-precision walk."""
    seqlen = 65536
    tensors = arguments(batch=1, dim=2, seqlen=seqlen, dstate=dstate, B=0, C=0, optional='s', dtype=torch.float32)
    tensors['delta'] = tensors['delta'] * 1e-2
    y, state = library(**tensors, reverse=reverse)
    one = {k: t if k == 'A' else t[0] for k, t in tensors.items() if t is not None}
    u, delta, A, B, C, h = (one[k].double() for k in ('u', 'delta', 'A', 'B', 'C', 'initial_state'))
    decay = torch.exp(delta[:, None] * A[:, :, None]).numpy()
    drive = (delta[:, None] * B * u[:, None]).numpy()
    h, C, expected = h.numpy(), C.numpy(), torch.empty(2, seqlen, dtype=torch.float64)
    for step in range(seqlen - 1, -1, -1) if reverse else range(seqlen):
        h = decay[:, :, step] * h + drive[:, :, step]
        expected[:, step] = torch.from_numpy((h * C[:, step]).sum(axis=-1))
    oracles.assert_matches(y[0], expected, torch.float32, 'y')
    oracles.assert_matches(state[0], torch.from_numpy(h), torch.float32, 'state')


@pytest.mark.parametrize('batch', [0, 1])
def test_small_batches(batch):
    compare(arguments(batch=batch), torch.float64, delta_softplus=True)


@pytest.mark.parametrize('seqlen', [5, 64])
def test_a_sequence_can_be_cut_and_continued_from_its_state(seqlen):
    tensors = arguments(seqlen=seqlen)
    y, last = library(**tensors)
    cut, parts = seqlen // 3, []
    state = tensors['initial_state']
    for part in (slice(0, cut), slice(cut, seqlen)):
        pieces = {k: t[..., part] if k in ('u', 'delta', 'B', 'C', 'z') else t for k, t in tensors.items()}
        out, state = library(**{**pieces, 'initial_state': state})
        parts.append(out)
    oracles.assert_matches(torch.cat(parts, dim=-1), y, torch.float64)
    oracles.assert_matches(state, last, torch.float64)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_reverse_is_forward_on_the_flipped_sequence(reverse):
    tensors = arguments()
    flipped = {k: t.flip(-1) if k in ('u', 'delta', 'B', 'C', 'z') else t for k, t in tensors.items()}
    y, state = library(**tensors, reverse=reverse)
    other_y, other_state = library(**flipped, reverse=not reverse)
    oracles.assert_matches(other_y.flip(-1), y, torch.float64)
    oracles.assert_matches(other_state, state, torch.float64)
