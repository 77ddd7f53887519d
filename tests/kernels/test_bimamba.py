"""Vim's bidirectional scans, and the core around them, against float64 loops.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE, needs_triton
from kernel_cases import CASES, Case, compare, in_double, run
from recorder import Recorder
from torch.utils.flop_counter import FlopCounterMode

from vmamba.kernels import bidirectional_conv1d, bidirectional_scan, bimamba_core, chunked, naive, use_triton
from vmamba.kernels.bimamba import gate
from vmamba.kernels.bimamba.launch import ProjectionLayout
from vmamba.kernels.selective_scan import launch

SCAN, CORE = CASES['bidirectional_scan'], CASES['bimamba_core']

# What lies beyond the end of a tensor may be anything; arithmetic on it makes NaN now and then.
pytestmark = pytest.mark.filterwarnings('error:invalid value:RuntimeWarning')


@pytest.mark.parametrize('seqlen,dstate,batch', [(1, 16, 2), (2, 1, 1), (37, 16, 2), (151, 3, 1)])
def test_scans_in_plain_pytorch(seqlen, dstate, batch):
    tensors = kernel_cases.bidirectional_scan(batch, seqlen, dstate=dstate, dtype=torch.float64)
    compare(SCAN, tensors, torch.float64)


@pytest.mark.parametrize('elements,width,wide', [(1, 1, 1), (500, 62, 2**14)])
def test_chunks_of_any_size_in_plain_pytorch(elements, width, wide, monkeypatch):
    monkeypatch.setattr(chunked, '_CHUNK_ELEMENTS', elements)
    monkeypatch.setattr(chunked, '_CHUNK_WIDTH', width)
    monkeypatch.setattr(chunked, '_WIDE_STEP', wide)
    compare(SCAN, kernel_cases.bidirectional_scan(seqlen=40, dtype=torch.float64), torch.float64)


def test_the_naive_scan_agrees():
    tensors = in_double(kernel_cases.bidirectional_scan())
    actual, expected = run(naive.bidirectional_scan, tensors), run(oracles.bidirectional_scan, tensors)
    oracles.assert_all_match(actual, expected, torch.float64)


def test_flipping_the_sequence_swaps_the_directions_of_the_scan():
    tensors = kernel_cases.bidirectional_scan(dtype=torch.float64)
    flipped = {k: t.flip(1, 2) if k in ('u', 'x_dbl') else t.flip(0) for k, t in tensors.items()}
    actual, expected = bidirectional_scan(**flipped).flip(1), bidirectional_scan(**tensors)
    oracles.assert_matches(actual.cpu(), expected.cpu(), torch.float64)


def test_flipping_the_sequence_swaps_the_directions_of_the_core(dtype):
    tensors = kernel_cases.bimamba_core(dtype=dtype)
    flipped = {k: t.flip(1) if k == 'xz' else t.flip(0) for k, t in tensors.items()}
    actual, expected = bimamba_core(**flipped).flip(1), bimamba_core(**tensors)
    oracles.assert_matches(actual.cpu(), expected.cpu().double(), dtype)


SIZES = [
    pytest.param(dict(seqlen=1, dstate=1, dt_rank=1), id='one-step-n1-rank1'),
    pytest.param(dict(batch=1, seqlen=1), id='one-step-of-one-sequence'),
    pytest.param(dict(seqlen=16, dstate=4, dt_rank=8), id='a-tile-n4-rank8'),
    pytest.param(dict(seqlen=17, dstate=16, dt_rank=3, batch=1), id='n16-rank3'),
    pytest.param(dict(seqlen=3, dstate=19, dt_rank=9, batch=1), id='n19-rank9'),
    pytest.param(dict(seqlen=7, dim=1, dstate=2), id='one-channel-n2'),
    pytest.param(dict(seqlen=35, dim=33, batch=1, dstate=2), id='several-tiles-and-blocks-of-channels'),
    pytest.param(dict(seqlen=2, width=1), id='one-tap'),
    pytest.param(dict(seqlen=2, width=2), id='two-taps'),
    pytest.param(dict(seqlen=5, width=3), id='three-taps'),
    pytest.param(dict(width=5), id='more-taps-than-the-kernels-take'),
    pytest.param(dict(seqlen=5, dim=2, batch=1, dstate=65), id='more-states-than-the-kernels-take'),
]


@pytest.mark.parametrize('sizes', SIZES)
def test_cores(sizes, dtype):
    compare(CORE, kernel_cases.bimamba_core(**sizes, dtype=dtype), dtype)


@pytest.mark.parametrize('sizes', [dict(width=5), dict(seqlen=3, dim=2, dstate=65), dict(dstate=0)], ids=str)
def test_what_the_kernels_do_not_take_runs_operator_by_operator(sizes, triton_kernels):
    with Recorder() as calls:
        bimamba_core(**kernel_cases.bimamba_core(**sizes))
    assert calls.names == ['causal_conv1d', 'bidirectional_scan']
    with Recorder() as calls:
        bimamba_core(**kernel_cases.bimamba_core(seqlen=3))
    assert calls.names == ['bimamba_core']


@pytest.mark.parametrize('sizes', [dict(), dict(seqlen=17, dstate=4, dt_rank=8, batch=1)], ids=['padded', 'unpadded'])
def test_the_core_is_its_parts(sizes, dtype):
    """The convolutions, the projections, the scans and the gate."""

    def parts(xz, conv_weight, conv_bias, x_proj_weight, **parameters):
        x, z = xz.chunk(2, dim=-1)
        u = bidirectional_conv1d(x, conv_weight, conv_bias, silu=True)
        x_dbl = torch.einsum('blkd,kpd->blkp', u, x_proj_weight)
        return bidirectional_scan(u, x_dbl, **parameters) / 2 * torch.nn.functional.silu(z)

    tensors = kernel_cases.bimamba_core(**sizes, dtype=dtype)
    oracles.assert_all_match(run(bimamba_core, tensors), run(parts, tensors), dtype)


@pytest.mark.parametrize('chunks', [2, 3])
def test_chunks_of_the_sequence(chunks, triton_kernels, monkeypatch):
    monkeypatch.setattr(launch, 'CONFIG', launch.CONFIG._replace(chunks=chunks))
    compare(CORE, kernel_cases.bimamba_core(1, 50), torch.float32)


def test_several_tiles_in_half_precision(triton_kernels):
    compare(CORE, kernel_cases.bimamba_core(seqlen=20, dtype=torch.float16), torch.float16)


def test_a_model_in_half_precision_as_a_whole(backend):
    tensors = {k: t.half() for k, t in kernel_cases.bimamba_core().items()}
    actual = run(bimamba_core, tensors)
    expected = run(CORE.definition, in_double(tensors))
    oracles.assert_all_match(actual, expected, torch.float16, outliers=0.01)
    assert all(t.dtype == torch.float16 for t in actual.values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_autocast_does_not_change_the_dtype(dtype, backend):
    tensors = kernel_cases.bimamba_core(dtype=dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = bimamba_core(**tensors)
    assert out.dtype == dtype
    # The products, one after the other, are rounded to bfloat16.
    assert oracles.relative_error(out.cpu(), CORE.definition(**in_double(tensors))) < 0.03


def test_steps_that_lie_far_apart(backend):
    """A tensor of one step counts as contiguous, whatever its stride along the sequence."""
    tensors = kernel_cases.bimamba_core(batch=3, seqlen=1)
    apart = torch.full((1, 40, tensors['xz'].shape[-1]), float('nan'), device=DEVICE)
    xz = apart[:, :3].transpose(0, 1).copy_(tensors['xz'])
    expected = run(bimamba_core, tensors)
    oracles.assert_all_match(run(bimamba_core, {**tensors, 'xz': xz}), expected, torch.float32)


def test_gradients_in_any_layout(backend):
    leaves = [t.requires_grad_() for t in kernel_cases.bimamba_core().values()]
    out = bimamba_core(*leaves)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, grad.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs)


def test_without_a_state_the_skip_connection_is_left(backend):
    tensors = kernel_cases.bimamba_core(dstate=0)
    results = run(bimamba_core, tensors)
    doubles = in_double(tensors)
    x, z = doubles['xz'].chunk(2, dim=-1)
    u = oracles.bidirectional_conv1d(x, doubles['conv_weight'], doubles['conv_bias'], activation='silu')
    oracles.assert_matches(results['result_0'], (doubles['D'] * u).sum(dim=2) / 2 * oracles.silu(z), torch.float32)
    assert results['grad_D'].all() and not results['grad_dt_weight'].any()


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(triton_kernels):
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.bimamba_core(seqlen=20).items()}
    with Recorder() as keeping:
        out = bimamba_core(**leaves)
    with torch.no_grad(), Recorder() as forgetting:
        assert torch.equal(bimamba_core(**leaves), out)
    assert all(t.numel() for t in keeping.outputs[0][1:])
    assert not any(t.numel() for t in forgetting.outputs[0][1:])


def test_maps_of_one_direction_alone_are_kept(triton_kernels):
    """The projections, the mean of both directions and few states, beside the arguments."""
    batch, seqlen, dim, dstate = 2, 20, 5, 3
    tensors = kernel_cases.bimamba_core(batch, seqlen, dim, dstate, dt_rank=2)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bimamba_core(**leaves)
    beside = sum(t.numel() for t in kept) - sum(t.numel() for t in tensors.values())
    states = 2 * batch * (-(-seqlen // launch.PACKED) + 1) * dstate * dim
    assert beside == 2 * batch * seqlen * ProjectionLayout.of(2, dstate).size + batch * seqlen * dim + states


LAYOUTS = [(1, 1), (2, 3), (8, 4), (8, 5), (3, 16), (9, 16), (12, 16), (24, 64)]


@pytest.mark.parametrize('rank,dstate', LAYOUTS)
def test_projections_are_padded_to_aligned_places_and_trimmed_again(rank, dstate):
    layout = ProjectionLayout.of(rank, dstate)
    assert layout.padded_rank % 8 == layout.size % 8 == 0
    assert 0 <= layout.padded_rank - rank < 8 and 0 <= layout.size - layout.padded_rank - 2 * dstate < 8
    weight, dt_weight = torch.randn(2, rank + 2 * dstate, 5), torch.randn(2, 5, rank)
    u, grad = torch.randn(2, 6, 5), torch.randn(2, layout.size, 5)
    x_dbl = u @ layout.x_proj(weight, torch.float32).mT
    dt, B, C = (u @ weight.mT).split([rank, dstate, dstate], dim=2)
    torch.testing.assert_close(layout.low_rank(x_dbl) @ layout.dt_proj(dt_weight, torch.float32).mT, dt @ dt_weight.mT)
    found_B, found_C, padding = layout.coefficients(x_dbl, (2, 3, 2, 5))
    for found, expected in ((found_B, B), (found_C, C)):
        torch.testing.assert_close(found, expected.view(2, 3, 2, dstate).permute(1, 0, 3, 2))
    assert not padding.any()
    assert torch.equal(layout.of_x_proj(layout.x_proj(weight, torch.float32)), weight)
    # What trims gradients is the adjoint of what pads weights.
    padded, trimmed = (layout.x_proj(weight, torch.float32) * grad).sum(), (weight * layout.of_x_proj(grad)).sum()
    torch.testing.assert_close(padded, trimmed)


def gate_definition(y, z):
    return (y[0] + y[1]) / 2 * oracles.silu(z)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('batch,seqlen,dim', [(1, 1, 1), (2, 9, 5), (3, 11, 130)])
def test_gates(batch, seqlen, dim, dtype, triton_kernels):
    """Of one and of several blocks in both dimensions; what is written lies within a wider tensor."""
    y = torch.randn(2, batch, seqlen, dim, device=DEVICE).to(dtype)
    xz = torch.randn(batch, seqlen, 2 * dim, device=DEVICE).to(dtype)
    z, grad_out = xz[..., dim:], torch.randn(batch, seqlen, dim, device=DEVICE).to(dtype)
    out, mean = gate.gate_forward(y, z, save=True)
    alone, nothing = gate.gate_forward(y, z, save=False)
    assert torch.equal(alone, out) and nothing is None
    grad_xz = torch.full_like(xz, 7)
    grad_y, again = gate.gate_backward(grad_out, mean, z, grad_xz[..., dim:], recompute_out=True)
    without_out = gate.gate_backward(grad_out, mean, z, torch.empty_like(xz)[..., dim:])
    assert torch.equal(without_out[0], grad_y) and without_out[1] is None
    leaves = y.cpu().double().requires_grad_(), z.cpu().double().requires_grad_()
    expected = gate_definition(*leaves)
    expected_y, expected_z = torch.autograd.grad(expected, leaves, grad_out.cpu().double())
    oracles.assert_matches(out.cpu(), expected.detach(), dtype, 'out')
    oracles.assert_matches(again.cpu(), expected.detach(), dtype, 'the output once more')
    for half in expected_y:
        oracles.assert_matches(grad_y.cpu(), half, dtype, 'grad_y')
    oracles.assert_matches(grad_xz[..., dim:].cpu(), expected_z, dtype, 'grad_z')
    assert grad_xz[..., :dim].eq(7).all()


@needs_triton
def test_both_backends_count_the_same_operations():
    """Forward and backward."""
    totals = []
    for enabled in (False, True):
        leaves = {k: t.requires_grad_() for k, t in kernel_cases.bimamba_core().items()}
        with use_triton(enabled), FlopCounterMode(display=False) as counter:
            bimamba_core(**leaves).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    'case,name,shape',
    [
        (SCAN, 'u', (2, 9, 5)),
        (SCAN, 'u', (2, 9, 3, 5)),
        (SCAN, 'u', (2, 0, 2, 5)),
        (CORE, 'xz', (9, 10)),
        (CORE, 'xz', (2, 9, 11)),
        (CORE, 'xz', (2, 0, 10)),
        (CORE, 'conv_weight', (2, 5, 0)),
    ],
    ids=lambda value: None if isinstance(value, Case) else str(value),
)
def test_a_bad_shape_is_an_error_that_shows_it(case, name, shape):
    tensors = {**case.arguments(), name: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(ValueError, match=f'{name} must be') as error:
        case.function(**tensors)
    assert str(shape) in str(error.value)
