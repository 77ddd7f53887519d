"""Memory that is kept between calls never shows: not in results, not between threads, not between modes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_selective_scan import arguments, library, run
from torch import nn
from vmamba.kernels import ss2d_scan


def equal(first, second):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def clone(results):
    return {k: None if t is None else t.clone() for k, t in results.items()}


@pytest.mark.parametrize('seqlen', [5, 301])
def test_results_survive_the_next_call(seqlen):
    first = run(library, arguments(seqlen=seqlen), delta_softplus=True)
    copies = clone(first)
    run(library, arguments(seqlen=seqlen), delta_softplus=True)
    run(library, arguments(seqlen=2 * seqlen, dstate=16), delta_softplus=True)
    assert equal(first, copies)


def test_results_do_not_depend_on_what_ran_before():
    tensors = arguments(seqlen=77, dtype=torch.float32)
    first = clone(run(library, tensors, delta_softplus=True))
    for size in (3, 500, 76):
        other = arguments(seqlen=size, dtype=torch.float32)
        other['u'] = torch.full_like(other['u'], float('nan'))
        run(library, other, delta_softplus=True)
        assert equal(run(library, tensors, delta_softplus=True), first)


def test_a_backward_pass_may_come_after_other_calls():
    tensors = arguments(seqlen=77)
    expected = run(library, tensors, delta_softplus=True)
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    y, state = library(**leaves, delta_softplus=True)
    run(library, arguments(seqlen=300), delta_softplus=True)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(torch.bfloat16).double() for t in (y, state)]
    torch.autograd.backward((y, state), weights)
    assert all(torch.equal(leaf.grad, expected[f'grad_{name}']) for name, leaf in leaves.items())


def test_threads_do_not_share_it():
    cases = [arguments(batch=1, dim=8, seqlen=400 + i, dtype=torch.float32) for i in range(4)]
    expected = [clone(run_seeded(case)) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for results, single in zip(pool.map(run_seeded, cases), expected, strict=True):
                assert equal(results, single)


def run_seeded(tensors):
    """As `run`, without the global random state."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    y, state = library(**leaves, delta_softplus=True)
    torch.autograd.backward((y, state), (y.detach().sin(), state.detach().cos()))
    return {'y': y, 'state': state, **{k: t.grad for k, t in leaves.items()}}


@pytest.mark.parametrize('first', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_can_follow_each_other(first):
    """In a thread of its own, which has kept nothing yet."""

    def modes():
        tensors = arguments(seqlen=63, dtype=torch.float32)
        with first():
            before = library(**tensors, delta_softplus=True)[0].clone()
        results = run(library, tensors, delta_softplus=True)
        with torch.inference_mode():
            after = library(**tensors, delta_softplus=True)[0]
        return torch.equal(before, results['y']) and torch.equal(after, results['y'])

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(modes).result()


def test_models_take_turns():
    """Forward, forward, backward, backward."""
    x = torch.randn(1, 6, 7, 4)
    layers = [nn.Linear(4, 4 * 4, bias=False) for _ in range(2)]
    weight, bias, A, D = torch.rand(4, 4, 2), torch.zeros(4, 4), -torch.rand(4, 4, 1), torch.ones(4, 4)

    def forward(layer):
        return ss2d_scan(x, layer(x).unflatten(-1, (4, 4)), weight, bias, A, D).square().sum()

    alone = [torch.autograd.grad(forward(layer), layer.weight)[0] for layer in layers]
    losses = [forward(layer) for layer in layers]
    together = [torch.autograd.grad(loss, layer.weight)[0] for loss, layer in zip(losses, layers)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
