"""Random checkpoints of U-Mamba with the official names, and what the official networks compute from them in float64.

Nothing here imports the library. A plan is a dict with `patch_size`, `features`, `kernel_sizes`, `strides` and the
numbers of blocks that are left after the official reduction, `encoder_blocks` and `decoder_blocks`.
"""

import math

import oracles
import torch
import torch.nn.functional as F
from official import add_linear, add_norm, below, normal
from official_language_model import mamba
from official_mamba2 import add_mamba2, mamba2

CONV = {2: F.conv2d, 3: F.conv3d}


def add_conv(state, name, dim, out_dim, kernel):
    add_linear(state, name, out_dim, dim, *kernel)


def add_blocks(state, name, dim, out_dim, kernel, blocks):
    add_conv(state, f'{name}.0.conv1', dim, out_dim, kernel)
    add_conv(state, f'{name}.0.conv2', out_dim, out_dim, kernel)
    add_conv(state, f'{name}.0.conv3', dim, out_dim, [1] * len(kernel))
    for norm in ('norm1', 'norm2'):
        add_norm(state, f'{name}.0.{norm}', out_dim)
    for j in range(1, blocks):
        for part in ('conv1', 'conv2'):
            add_conv(state, f'{name}.{j}.{part}.conv', out_dim, out_dim, kernel)
            add_norm(state, f'{name}.{j}.{part}.norm', out_dim)


def add_mamba(state, name, dim, d_state=16, expand=2):
    """Adds random parameters with the official names."""
    inner, rank = expand * dim, math.ceil(dim / 16)
    add_linear(state, f'{name}.in_proj', 2 * inner, dim, bias=False)
    add_linear(state, f'{name}.conv1d', inner, 1, 4)
    add_linear(state, f'{name}.x_proj', rank + 2 * d_state, inner, bias=False)
    state[f'{name}.dt_proj.weight'] = normal(inner, rank, std=rank**-0.5)
    state[f'{name}.dt_proj.bias'] = normal(inner, mean=-2)
    state[f'{name}.A_log'] = torch.arange(1.0, d_state + 1).log() + normal(inner, d_state, std=0.3)
    state[f'{name}.D'] = normal(inner, mean=1, std=0.3)
    add_linear(state, f'{name}.out_proj', dim, inner, bias=False)


def add_mamba_layer(state, name, dim, mixer):
    add_norm(state, f'{name}.norm', dim)
    if mixer == 'mamba':
        add_mamba(state, f'{name}.mamba', dim)
    elif mixer == 'mamba2':
        add_mamba2(state, f'{name}.mamba', dim, 16, headdim_of(dim))


def headdim_of(dim):
    """The largest divisor of 2 * dim up to 64."""
    head = 64
    while (2 * dim) % head:
        head -= 1
    return head


def mixed_stages(plan):
    """Stage: whether the Mamba layer after it, in the encoder, has channels as tokens, and the size of a token."""
    n, size, found = len(plan['features']), list(plan['patch_size']), {}
    for s in range(n):
        size = [side // step for side, step in zip(size, plan['strides'][s])]
        if len(size) == 3 or (s % 2 == 1) != (n % 2 == 1):
            by_channel = math.prod(size) <= plan['features'][s]
            found[s] = by_channel, math.prod(size) if by_channel else plan['features'][s]
    return found


def umamba_state(kind, plan, in_chans, num_classes, mixer='mamba'):
    """A random checkpoint with all names that official files have."""
    state, features, kernels = {}, plan['features'], plan['kernel_sizes']
    ndim, n = len(plan['patch_size']), len(features)
    add_blocks(state, 'encoder.stem', in_chans, features[0], kernels[0], plan['encoder_blocks'][0])
    for s in range(n):
        dim = features[max(s - 1, 0)]
        add_blocks(state, f'encoder.stages.{s}', dim, features[s], kernels[s], plan['encoder_blocks'][s])
    if kind == 'enc' and mixer != 'none':
        for s, (_, size) in mixed_stages(plan).items():
            add_mamba_layer(state, f'encoder.mamba_layers.{s}', size, mixer)
    elif mixer != 'none':
        add_mamba_layer(state, 'mamba_layer', features[-1], mixer)
    for i in range(n - 1):
        deep, dim = features[n - 1 - i], features[n - 2 - i]
        joined = dim if ndim == 2 and i == n - 2 else 2 * dim
        add_conv(state, f'decoder.upsample_layers.{i}.conv', deep, dim, [1] * ndim)
        add_blocks(state, f'decoder.stages.{i}', joined, dim, kernels[n - 2 - i], plan['decoder_blocks'][i])
        add_conv(state, f'decoder.seg_layers.{i}', dim, num_classes, [1] * ndim)
    return with_aliases(state)


def with_aliases(state):
    """The state with the second names of its tensors."""
    for key, value in list(state.items()):
        for name, position in (('conv', 0), ('norm', 1)):
            if f'.{name}.' in key and key.split(f'.{name}.')[0].endswith(('.conv1', '.conv2')):
                state[key.replace(f'.{name}.', f'.all_modules.{position}.')] = value
    state.update({f'decoder.{key}': value for key, value in state.items() if key.startswith('encoder.')})
    return state


def conv(state, name, x, stride=1):
    weight = state[f'{name}.weight']
    padding = [side // 2 for side in weight.shape[2:]]
    return CONV[x.ndim - 2](x, weight, state[f'{name}.bias'], stride, padding)


def norm(state, name, x):
    axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + 1e-5)
    return scaled * state[f'{name}.weight'].view(shape) + state[f'{name}.bias'].view(shape)


def act(x):
    return torch.where(x > 0, x, 0.01 * x)


def blocks(state, name, x, count, stride=1):
    first = f'{name}.0'
    y = act(norm(state, f'{first}.norm1', conv(state, f'{first}.conv1', x, stride)))
    y = norm(state, f'{first}.norm2', conv(state, f'{first}.conv2', y))
    x = act(y + conv(state, f'{first}.conv3', x, stride))
    for j in range(1, count):
        block = f'{name}.{j}'
        y = act(norm(state, f'{block}.conv1.norm', conv(state, f'{block}.conv1.conv', x)))
        x = act(norm(state, f'{block}.conv2.norm', conv(state, f'{block}.conv2.conv', y)) + x)
    return x


def mamba_layer(state, name, x, by_channel, mixer):
    tokens = x.flatten(2) if by_channel else x.flatten(2).mT
    tokens = oracles.layer_norm(tokens, state[f'{name}.norm.weight'], state[f'{name}.norm.bias'])
    p = below(state, f'{name}.mamba.')
    out = mamba(p, tokens) if mixer == 'mamba' else mamba2(p, tokens, headdim_of(tokens.shape[-1]), 16)
    return (out if by_channel else out.mT).reshape(x.shape)


def umamba_logits(state, kind, plan, images, mixer='mamba'):
    """Logits of every step of the decoder, full resolution first; state and images in float64."""
    n, ndim, strides = len(plan['features']), len(plan['patch_size']), plan['strides']
    mixed = mixed_stages(plan) if kind == 'enc' and mixer != 'none' else {}
    x, skips, outputs = blocks(state, 'encoder.stem', images, plan['encoder_blocks'][0]), [], []
    for s in range(n):
        x = blocks(state, f'encoder.stages.{s}', x, plan['encoder_blocks'][s], tuple(strides[s]))
        if s in mixed:
            x = mamba_layer(state, f'encoder.mamba_layers.{s}', x, mixed[s][0], mixer)
        skips.append(x)
    if kind == 'bot' and mixer != 'none':
        x = mamba_layer(state, 'mamba_layer', x, False, mixer)
    for i in range(n - 1):
        for axis, factor in enumerate(strides[n - 1 - i]):
            x = x.repeat_interleave(factor, dim=2 + axis)
        x = conv(state, f'decoder.upsample_layers.{i}.conv', x)
        if ndim == 3 or i < n - 2:
            x = torch.cat([x, skips[n - 2 - i]], dim=1)
        x = blocks(state, f'decoder.stages.{i}', x, plan['decoder_blocks'][i])
        outputs.insert(0, conv(state, f'decoder.seg_layers.{i}', x))
    return outputs
