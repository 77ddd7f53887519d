"""The Mamba-2 block from its official parameters, and random ones, in float64. Nothing here imports the library."""

import math

import oracles
import torch
from official import add_linear, normal


def add_mamba2(state, name, dim, d_state, headdim, expand=2):
    """Adds random parameters with the official names."""
    inner = expand * dim
    heads, channels = inner // headdim, inner + 2 * d_state
    add_linear(state, f'{name}.in_proj', inner + channels + heads, dim, bias=False)
    add_linear(state, f'{name}.conv1d', channels, 1, 4)
    state[f'{name}.dt_bias'] = normal(heads, mean=-2)
    state[f'{name}.A_log'] = torch.rand(heads) * math.log(16)
    state[f'{name}.D'] = normal(heads, mean=1, std=0.3)
    state[f'{name}.norm.weight'] = normal(inner, mean=1, std=0.2)
    add_linear(state, f'{name}.out_proj', dim, inner, bias=False)


def gated_norm(y, z, weight, groups=1, norm_before_gate=False):
    """rms(y * silu(z)), or rms(y) * silu(z), over each group of channels."""
    gate, ones = oracles.silu(z), torch.ones(y.shape[-1] // groups, dtype=y.dtype)
    y = y if norm_before_gate else y * gate
    y = torch.cat([oracles.rms_norm(part, ones) for part in y.chunk(groups, dim=-1)], dim=-1) * weight
    return y * gate if norm_before_gate else y


def ssd(xBC, dt, A_log, D, dt_bias, headdim, d_state, ngroups=1, **options):
    """The scan of [B, L, d_ssm + 2 * G * N], one head and step at a time: [B, L, d_ssm]"""
    heads, states = A_log.shape[0], ngroups * d_state
    x, B, C = xBC.split([heads * headdim, states, states], dim=-1)
    x, B, C = x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    D = D.view(heads, headdim) if len(D) == heads * headdim else D
    options = dict(dt_bias=dt_bias, dt_softplus=True, **options)
    return oracles.ssd_scan(x, dt, -torch.exp(A_log), B, C, D=D, **options)[0].flatten(2)


def mamba2(p, h, headdim, d_state, ngroups=1, dt_limit=(0, math.inf), norm_before_gate=False):
    """[B, L, d] -> [B, L, d]"""
    d_ssm, heads, states = len(p['A_log']) * headdim, len(p['A_log']), ngroups * d_state
    proj = h @ p['in_proj.weight'].T + p.get('in_proj.bias', 0)
    beside = (proj.shape[-1] - heads - 2 * d_ssm - 2 * states) // 2
    z0, x0, z, xBC, dt = proj.split([beside, beside, d_ssm, d_ssm + 2 * states, heads], dim=-1)
    conv, _ = oracles.causal_conv1d(xBC.mT, p['conv1d.weight'][:, 0], p.get('conv1d.bias'))
    parameters = p['A_log'], p['D'], p['dt_bias']
    y = ssd(oracles.silu(conv.mT), dt, *parameters, headdim, d_state, ngroups, dt_limit=dt_limit)
    if 'norm.weight' in p:
        y = gated_norm(y, z, p['norm.weight'], ngroups, norm_before_gate)
    else:
        y = y * oracles.silu(z)
    y = torch.cat([oracles.silu(z0) * x0, y], dim=-1)
    return y @ p['out_proj.weight'].T + p.get('out_proj.bias', 0)
