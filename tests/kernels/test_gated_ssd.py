"""`gated_non_causal_ssd`, VSSD's mixer up to its gate, on Triton against its definition."""

import oracles
import pytest
import torch
from cases import DEVICE
from kernel_cases import Case, assert_equal, compare, place, randn, run

from vmamba.kernels.ssd import gated

pytestmark = [
    pytest.mark.usefixtures('triton_kernels'),
    pytest.mark.filterwarnings('error:invalid value:RuntimeWarning'),
]


def arguments(batch=2, length=19, heads=3, dim=5, dstate=4, dtype=torch.float32):
    width = heads * dim
    maps = dict(
        xBC=randn(batch, length, width + 2 * dstate),
        dt=randn(batch, length, heads),
        z=randn(batch, length, width),
    )
    parameters = dict(
        A=-randn(heads).abs() - 0.1,
        D=randn(heads),
        dt_bias=randn(heads),
        weight=1 + 0.3 * randn(width),
        bias=randn(width),
    )
    return place(maps, parameters, dtype)


def define(xBC, dt, z, A, D, dt_bias, weight, bias, eps):
    width, heads = z.shape[-1], dt.shape[-1]
    dstate = (xBC.shape[-1] - width) // 2
    x, B, C = xBC.split([width, dstate, dstate], dim=-1)
    x = x.unflatten(-1, (heads, -1))
    y = oracles.non_causal_ssd(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), D, dt_bias, dt_softplus=True)
    return oracles.layer_norm(y.flatten(2), weight, bias, eps) * z


CASE = Case(gated.gated_non_causal_ssd, arguments, define, dict(eps=1e-3))
SIZES = {
    'one-position': dict(length=1),
    'heads-of-3': dict(heads=3, dim=5),
    'a-head': dict(heads=1, dim=20, dstate=17),
    'powers-of-2': dict(heads=4, dim=16, dstate=16, length=32),
    'long': dict(length=150, batch=1),
}


@pytest.fixture
def small_parts(fresh_launches, monkeypatch):
    """Sequences cut into parts of a few blocks."""
    monkeypatch.setattr(gated, '_MIN_STEPS', 64)
    monkeypatch.setattr(gated, '_BACKWARD_ELEMENTS', 512)
    monkeypatch.setattr(gated, 'num_processors', lambda tensor: 1)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_results_and_gradients(sizes, small_parts):
    tensors = arguments(**sizes)
    assert gated.fits(tensors['z'], tensors['dt'].shape[-1], sizes.get('dstate', 4))
    compare(CASE, tensors, torch.float32)


# Of one position or head the norm takes the scale away again: gradients that cancel, of which fp16 leaves rounding.
@pytest.mark.parametrize('sizes', ['heads-of-3', 'powers-of-2', 'long'])
def test_half_precision(sizes, small_parts):
    compare(CASE, arguments(**SIZES[sizes], dtype=torch.float16), torch.float16)


def test_layouts(small_parts):
    """Parts of a wider tensor, as the projection leaves them, and channels that are no neighbours."""
    tensors = arguments()
    expected = run(CASE.function, tensors, **CASE.options)
    wide = torch.cat([tensors['z'], tensors['xBC'], tensors['dt']], dim=-1)
    z, xBC, dt = wide.split([tensors[name].shape[-1] for name in ('z', 'xBC', 'dt')], dim=-1)
    assert_equal(run(CASE.function, {**tensors, 'z': z, 'xBC': xBC, 'dt': dt}, **CASE.options), expected)
    turned = {name: tensors[name].mT.contiguous().mT for name in ('z', 'xBC', 'dt')}
    assert_equal(run(CASE.function, {**tensors, **turned}, **CASE.options), expected)


def test_opcheck():
    tensors = {name: tensor.requires_grad_() for name, tensor in arguments(batch=1, length=5).items()}
    torch.library.opcheck(
        torch.ops.vmamba.gated_non_causal_ssd, (*tensors.values(), 1e-3, True), **oracles.OPCHECK_TOLERANCE
    )


def test_what_does_not_fit():
    z = torch.empty(1, 4, 1024, device=DEVICE)
    assert not gated.fits(z, 8, 64) and not gated.fits(z[..., :512], 2, 64) and not gated.fits(z[..., :512], 8, 256)
