"""Every kernel that models and operators launch compiles for each architecture, within its shared memory.

Models run here in training and inference, by the fused branches of their blocks and by their modules. Nothing is run on
a GPU, so that none is needed; `make test-targets` takes an hour on two cores.
"""

import functools
from functools import partial

import pytest
import torch
from compiler import DEVICES, compile_for, record_calls, record_models

from vmamba.kernels import (
    MambaWeights,
    add_norm,
    causal_conv1d,
    causal_conv1d_update,
    mamba_step,
    selective_scan,
    selective_state_update,
    ssd_scan,
)

MODELS = 'vmamba_t', 'vmamba_t_v0', 'vim_t', 'mambavision_t', 'vssd_micro', 'adventurer_t', 'vmamba_t_m2', 'vim2_t'
DTYPES = torch.float32, torch.bfloat16
SHARES = 4  # that workers compile side by side


def mamba(dtype, batch=8, dim=1536, seqlen=2048, dstate=16):
    """The operators of a Mamba layer with its gradients, and of its step."""
    x = torch.empty(batch, seqlen, dim, dtype=dtype).mT.requires_grad_()
    B, C = (torch.empty(batch, dstate, seqlen, dtype=dtype) for _ in range(2))
    A, D, bias = torch.empty(dim, dstate), torch.empty(dim), torch.empty(dim)
    u = causal_conv1d(x, torch.empty(dim, 4, dtype=dtype), torch.empty(dim, dtype=dtype), activation='silu')
    selective_scan(u, u, A, B, C, D, z=x, delta_bias=bias, delta_softplus=True).sum().backward()
    state, step = torch.empty(batch, dim, dstate), torch.empty(batch, dim, dtype=dtype)
    selective_state_update(state, step, step, A, B[..., 0], C[..., 0], D, step, bias, dt_softplus=True)


@torch.no_grad()
def step(dtype, dim=768, inner=1536, dstate=16, rank=48):
    """The kernels of a language model's step, and the norm between its blocks with gradients."""
    empty = partial(torch.empty, dtype=dtype)
    conv_state, state = empty(1, inner, 4), torch.empty(1, inner, dstate)
    causal_conv1d_update(empty(1, inner), conv_state, empty(inner, 4), empty(inner), 'silu')
    narrow = empty(2 * inner, dim), empty(inner, 4), empty(inner), empty(rank + 2 * dstate, inner), empty(inner, rank)
    wide = torch.empty(inner), torch.empty(inner, dstate), torch.empty(inner)
    mamba_step(empty(1, dim), conv_state, state, MambaWeights(*narrow, *wide, empty(dim, inner)))
    for bias in (None, empty(dim)):
        x = empty(8, 64, dim).requires_grad_()
        with torch.enable_grad():
            sum(y.float().sum() for y in add_norm(x, x.float(), empty(dim), bias)).backward()


SSD = (24, 64, 128), (12, 32, 48), (2, 128, 128)  # heads, channels and states of a head


def ssd(dtype, batch=8, seqlen=2048):
    """Scans of Mamba-2 with their gradients, also with a gate and packed sequences."""
    for heads, dim, dstate in SSD:
        x = torch.empty(batch, seqlen, heads, dim, dtype=dtype, requires_grad=True)
        B = torch.empty(batch, seqlen, 1, dstate, dtype=dtype)
        A, D, bias = (torch.empty(heads) for _ in range(3))
        numbers = torch.empty(batch, seqlen, dtype=torch.int32)
        for z, seq_idx in ((None, None), (x, numbers)):
            y = ssd_scan(x, x[..., 0], A, B, B, 256, D, z, bias, seq_idx=seq_idx, dt_softplus=True)
            y.sum().backward()


@functools.cache
def launches_on(name):
    """Launches of models and operators on a device, by what decides what is compiled."""
    device = DEVICES[name]
    launches = record_models(device, MODELS, DTYPES)
    launches.update(record_calls(device, [partial(call, dtype) for call in (mamba, step, ssd) for dtype in DTYPES]))
    kernels = {recorded.kernel for recorded in launches.values()}
    expected = {'scan_backward_kernel', 'join_kernel', 'state_update_kernel', 'projection_gradient_kernel'}
    expected |= {'product_kernel', 'recurrence_kernel', 'conv_update_kernel'}
    assert len(launches) > 150 and expected <= kernels
    return launches


@pytest.mark.parametrize('share', range(SHARES))
@pytest.mark.parametrize('name', DEVICES)
def test_kernels_compile_and_fit(name, share):
    device, launches = DEVICES[name], launches_on(name)
    needed = {}
    for key in sorted(launches, key=str)[share::SHARES]:
        needed.setdefault(launches[key].kernel, []).append((compile_for(device, launches[key]), key))
    for kernel, all_needed in sorted(needed.items()):
        most = max(memory for memory, _ in all_needed) / 1024
        print(f'{name} {kernel}: {len(all_needed)} compiled, at most {most:.0f} KiB')
    too_large = [(memory, key) for found in needed.values() for memory, key in found if memory > device.shared_memory]
    assert not too_large
