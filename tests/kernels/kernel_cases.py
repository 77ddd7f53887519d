"""The operators with arguments of small sizes, and what tests do with them: run them, and compare with `oracles`."""

from typing import Any, Callable, Dict, NamedTuple

import oracles
import torch
from cases import DEVICE

from vmamba import kernels
from vmamba.kernels import NUM_DIRECTIONS, NUM_ROUTES


class Case(NamedTuple):
    """An operator.

    Args:
        function: Public function.
        arguments: Tensors by name, absent ones None, from sizes and the dtype of maps and sequences; parameters have
            at least fp32.
        definition: The same in float64, by `oracles`.
        options: Other arguments of both.
    """

    function: Callable[..., Any]
    arguments: Callable[..., Dict[str, torch.Tensor]]
    definition: Callable[..., Any]
    options: Dict[str, Any] = {}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def wide_of(dtype):
    return torch.promote_types(dtype, torch.float32)


def place(maps, parameters, dtype):
    """Maps and sequences in a dtype and parameters in at least fp32, on the device of the tests; None stays."""
    dtypes = {**dict.fromkeys(maps, dtype), **dict.fromkeys(parameters, wide_of(dtype))}
    return {k: None if t is None else t.to(DEVICE, dtypes[k]) for k, t in {**maps, **parameters}.items()}


def scan_parameters(routes, dim, dstate, dt_rank):
    """Of scans whose steps stay small, as in a model, so that the sums over states are well conditioned."""
    return {
        'dt_weight': randn(routes, dim, dt_rank) * dt_rank**-0.5,
        'dt_bias': randn(routes, dim) - 2,
        'A': -randn(routes, dim, dstate).abs(),
        'D': randn(routes, dim),
    }


def selective_scan(
    batch=2, dim=6, seqlen=19, dstate=3, B=2, C=2, share=1, optional='Dzbs', steps=0.5, dtype=torch.float32
):
    """Arguments of `selective_scan`.

    Args:
        B, C: Number of groups; 0 for [batch, N, L], None for constants [dim, N].
        share: Channels that share a step size.
        optional: Letters of the optional arguments that are given: D, z, delta_bias (b), initial_state (s).
        steps: Largest step.
    """
    maps = {
        'u': randn(batch, dim, seqlen),
        'delta': torch.rand(batch, dim // share, seqlen, dtype=torch.float64) * steps,
        'z': randn(batch, dim, seqlen) if 'z' in optional else None,
    }
    parameters = {
        'A': -torch.rand(dim, dstate, dtype=torch.float64) * 2,
        'D': randn(dim) if 'D' in optional else None,
        'delta_bias': torch.rand(dim, dtype=torch.float64) - 0.5 if 'b' in optional else None,
        'initial_state': randn(batch, dim, dstate) if 's' in optional else None,
    }
    for name, groups in (('B', B), ('C', C)):
        if groups is None:
            parameters[name] = randn(dim, dstate)
        else:
            maps[name] = randn(batch, *([groups] if groups else []), dstate, seqlen)
    order = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'initial_state')
    placed = place(maps, parameters, dtype)
    return {name: placed[name] for name in order}


def ssd_scan(
    batch=2,
    seqlen=19,
    heads=4,
    dim=5,
    dstate=3,
    groups=2,
    optional='Dzbs',
    steps=0.5,
    head_dims=False,
    dtype=torch.float32,
):
    """Arguments of `ssd_scan`; see `selective_scan`.

    Args:
        head_dims: D is [H, P].
    """
    maps = {
        'x': randn(batch, seqlen, heads, dim),
        'dt': torch.rand(batch, seqlen, heads, dtype=torch.float64) * steps,
        'B': randn(batch, seqlen, groups, dstate),
        'C': randn(batch, seqlen, groups, dstate),
        'z': randn(batch, seqlen, heads, dim) if 'z' in optional else None,
    }
    parameters = {
        'A': -torch.rand(heads, dtype=torch.float64) * 2,
        'D': randn(heads, *([dim] if head_dims else [])) if 'D' in optional else None,
        'dt_bias': torch.rand(heads, dtype=torch.float64) - 0.5 if 'b' in optional else None,
        'initial_states': randn(batch, heads, dim, dstate) if 's' in optional else None,
    }
    placed = place(maps, parameters, dtype)
    return {name: placed[name] for name in ('x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias', 'initial_states')}


def ss2d_scan(batch=2, size=(3, 5), dim=5, dstate=2, dt_rank=2, dtype=torch.float32):
    maps = {'x': randn(batch, *size, dim), 'x_dbl': randn(batch, *size, NUM_ROUTES, dt_rank + 2 * dstate)}
    return place(maps, scan_parameters(NUM_ROUTES, dim, dstate, dt_rank), dtype)


def ss2d_core(batch=2, size=(3, 5), dim=5, dstate=2, dt_rank=2, dtype=torch.float32):
    projection = {'x_proj_weight': randn(NUM_ROUTES * (dt_rank + 2 * dstate), dim) * dim**-0.5}
    norm = {'norm_weight': 1 + 0.3 * randn(dim), 'norm_bias': randn(dim)}
    parameters = {**projection, **scan_parameters(NUM_ROUTES, dim, dstate, dt_rank), **norm}
    return place({'x': randn(batch, *size, dim)}, parameters, dtype)


def bidirectional_scan(batch=2, seqlen=9, dim=5, dstate=3, dt_rank=2, dtype=torch.float32):
    maps = {
        'u': randn(batch, seqlen, NUM_DIRECTIONS, dim),
        'x_dbl': randn(batch, seqlen, NUM_DIRECTIONS, dt_rank + 2 * dstate),
    }
    return place(maps, scan_parameters(NUM_DIRECTIONS, dim, dstate, dt_rank), dtype)


def bimamba_core(batch=2, seqlen=9, dim=5, dstate=3, dt_rank=2, width=4, dtype=torch.float32):
    parameters = {
        'conv_weight': randn(NUM_DIRECTIONS, dim, width),
        'conv_bias': randn(NUM_DIRECTIONS, dim),
        'x_proj_weight': randn(NUM_DIRECTIONS, dt_rank + 2 * dstate, dim) * dim**-0.5,
        **scan_parameters(NUM_DIRECTIONS, dim, dstate, dt_rank),
    }
    return place({'xz': randn(batch, seqlen, 2 * dim)}, parameters, dtype)


def bidirectional_conv1d(batch=2, seqlen=9, dim=5, width=4, dtype=torch.float32):
    parameters = {'weight': randn(NUM_DIRECTIONS, dim, width), 'bias': randn(NUM_DIRECTIONS, dim)}
    return place({'x': randn(batch, seqlen, dim)}, parameters, dtype)


def causal_conv1d(batch=2, seqlen=9, dim=5, width=4, bias=True, initial=False, dtype=torch.float32):
    maps = {'x': randn(batch, dim, seqlen), 'initial_states': randn(batch, dim, width - 1) if initial else None}
    return place(maps, {'weight': randn(dim, width), 'bias': randn(dim) if bias else None}, dtype)


def depthwise_conv2d(batch=2, height=3, width=4, dim=5, kernel=3, bias=True, dtype=torch.float32):
    parameters = {'weight': randn(dim, kernel, kernel), 'bias': randn(dim) if bias else None}
    return place({'x': randn(batch, height, width, dim)}, parameters, dtype)


def rms_norm(shape=(3, 5, 13), dtype=torch.float32):
    return place({'x': 3 + randn(*shape)}, {'weight': 1 + 0.3 * randn(shape[-1])}, dtype)


def gated_rms_norm(shape=(3, 5, 12), optional='o', dtype=torch.float32):
    """Arguments of `gated_rms_norm`; with the letter o the other input."""
    maps = {'y': randn(*shape), 'z': randn(*shape), 'other': randn(*shape) if 'o' in optional else None}
    return place(maps, {'weight': 1 + 0.3 * randn(shape[-1])}, dtype)


def layer_norm(shape=(3, 5, 13), dtype=torch.float32):
    return place({'x': 3 + randn(*shape)}, {'weight': 1 + 0.3 * randn(shape[-1]), 'bias': randn(shape[-1])}, dtype)


def add_norm(shape=(3, 5, 13), optional='rb', dtype=torch.float32):
    """Arguments of `add_norm`; r and b are residual, which has at least fp32, and bias."""
    parameters = {
        'residual': randn(*shape) if 'r' in optional else None,
        'weight': 1 + 0.3 * randn(shape[-1]),
        'bias': randn(shape[-1]) if 'b' in optional else None,
    }
    return place({'x': 3 + randn(*shape)}, parameters, dtype)


def _first(function):
    return lambda **arguments: function(**arguments)[0]


def _activated(function):
    """A definition whose activation is the library's `silu`."""
    return lambda silu=False, **tensors: function(**tensors, activation='silu' if silu else None)


CASES = {
    'selective_scan': Case(
        lambda **arguments: kernels.selective_scan(**arguments, return_last_state=True),
        selective_scan,
        oracles.selective_scan,
        dict(delta_softplus=True),
    ),
    'ssd_scan': Case(
        lambda **arguments: kernels.ssd_scan(**arguments, return_final_states=True),
        ssd_scan,
        oracles.ssd_scan,
        dict(chunk_size=8, dt_softplus=True),
    ),
    'ss2d_scan': Case(kernels.ss2d_scan, ss2d_scan, oracles.ss2d_scan),
    'ss2d_core': Case(kernels.ss2d_core, ss2d_core, oracles.ss2d_core, dict(norm_eps=1e-3)),
    'bidirectional_scan': Case(kernels.bidirectional_scan, bidirectional_scan, oracles.bidirectional_scan),
    'bimamba_core': Case(kernels.bimamba_core, bimamba_core, oracles.bimamba_core),
    'bidirectional_conv1d': Case(
        kernels.bidirectional_conv1d, bidirectional_conv1d, _activated(oracles.bidirectional_conv1d), dict(silu=True)
    ),
    'causal_conv1d': Case(kernels.causal_conv1d, causal_conv1d, _first(oracles.causal_conv1d), dict(activation='silu')),
    'depthwise_conv2d': Case(
        kernels.depthwise_conv2d, depthwise_conv2d, _activated(oracles.depthwise_conv2d), dict(silu=True)
    ),
    'rms_norm': Case(kernels.rms_norm, rms_norm, oracles.rms_norm, dict(eps=1e-3)),
    'gated_rms_norm': Case(kernels.gated_rms_norm, gated_rms_norm, oracles.gated_rms_norm, dict(eps=1e-3)),
    'layer_norm': Case(kernels.layer_norm, layer_norm, oracles.layer_norm, dict(eps=1e-3)),
    'add_norm': Case(kernels.add_norm, add_norm, oracles.add_norm, dict(eps=1e-3)),
}


def run(function, tensors, wanted=None, grad_scale=1.0, **options):
    """Results and gradients by name, on the CPU.

    Args:
        wanted: Names of the tensors that want a gradient; all by default.
        grad_scale: Factor of all gradients.
    """
    wanted = [k for k, t in tensors.items() if t is not None] if wanted is None else wanted
    leaves = {k: t.detach().requires_grad_() if k in wanted else t for k, t in tensors.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    # Rounded as both sides round them, so that they leave nothing for a comparison to differ in.
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y) for y in results]
    weights = [weight * grad_scale for weight in weights]
    reached = [(y, weight) for y, weight in zip(results, weights) if y.requires_grad]
    outputs, weights = zip(*reached)
    grads = torch.autograd.grad(outputs, [leaves[k] for k in wanted], weights, materialize_grads=True)
    named = {f'result_{i}': y.detach() for i, y in enumerate(results)}
    return {k: t.cpu() for k, t in {**named, **{f'grad_{k}': g for k, g in zip(wanted, grads)}}.items()}


def in_double(tensors):
    return {k: None if t is None else t.detach().cpu().double() for k, t in tensors.items()}


def compare(case, tensors, dtype, outliers=0.0, **options):
    """Compares results and gradients with the definition, in the tolerances of a dtype."""
    options = {**case.options, **options}
    expected = run(case.definition, in_double(tensors), **options)
    oracles.assert_all_match(run(case.function, tensors, **options), expected, dtype, outliers)


def assert_equal(actual, expected):
    """Two runs that agree bit by bit."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
