"""Random checkpoints in the layout of MambaVision's files, and what the paper computes from them in float64.

Windows, heads and steps of the scans are loops; nothing here imports the library.
"""

import math

import oracles
import torch
import torch.nn.functional as F
from official import add_batch_norm, add_linear, add_norm, attention, batch_norm, below, count, normal


def mambavision_state(depths=(1, 1, 2, 2), dim=8, stem_dim=4, layer_scale=False, num_classes=1000):
    state = {}
    add_linear(state, 'patch_embed.conv_down.0', stem_dim, 3, 3, 3, bias=False)
    add_batch_norm(state, 'patch_embed.conv_down.1', stem_dim)
    add_linear(state, 'patch_embed.conv_down.3', dim, stem_dim, 3, 3, bias=False)
    add_batch_norm(state, 'patch_embed.conv_down.4', dim)
    for i, depth in enumerate(depths):
        for j in range(depth):
            name = f'levels.{i}.blocks.{j}'
            if i < 2:
                for k in (1, 2):
                    add_linear(state, f'{name}.conv{k}', dim, dim, 3, 3)
                    add_batch_norm(state, f'{name}.norm{k}', dim)
            else:
                _token_block(state, name, dim, scans=j < math.ceil(depth / 2), layer_scale=layer_scale)
        if i < len(depths) - 1:
            add_linear(state, f'levels.{i}.downsample.reduction.0', 2 * dim, dim, 3, 3, bias=False)
            dim *= 2
    add_batch_norm(state, 'norm', dim)
    add_linear(state, 'head', num_classes, dim)
    return state


def _token_block(state, name, dim, scans, layer_scale):
    inner, rank = dim // 2, math.ceil(dim / 16)
    for k in (1, 2):
        add_norm(state, f'{name}.norm{k}', dim)
        if layer_scale:
            state[f'{name}.gamma_{k}'] = normal(dim, std=0.5)
    add_linear(state, f'{name}.mlp.fc1', 4 * dim, dim)
    add_linear(state, f'{name}.mlp.fc2', dim, 4 * dim)
    mixer = f'{name}.mixer'
    if not scans:
        add_linear(state, f'{mixer}.qkv', 3 * dim, dim)
        add_linear(state, f'{mixer}.proj', dim, dim)
        return
    add_linear(state, f'{mixer}.in_proj', dim, dim, bias=False)
    add_linear(state, f'{mixer}.x_proj', rank + 16, inner, bias=False)
    add_linear(state, f'{mixer}.dt_proj', inner, rank)
    add_linear(state, f'{mixer}.out_proj', dim, dim, bias=False)
    add_linear(state, f'{mixer}.conv1d_x', inner, 1, 3, bias=False)
    add_linear(state, f'{mixer}.conv1d_z', inner, 1, 3, bias=False)
    state[f'{mixer}.A_log'] = torch.arange(1.0, 9).log() + normal(inner, 8, std=0.3)
    state[f'{mixer}.D'] = normal(inner, mean=1, std=0.3)


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def symmetric_conv1d(x, weight):
    """[B, L, D] with a weight [D, 1, 3]: each token sees the one before and the one after it."""
    out = []
    for position in range(x.shape[1]):
        total = 0
        for tap in range(3):
            source = position + tap - 1
            if 0 <= source < x.shape[1]:
                total = total + weight[:, 0, tap] * x[:, source]
        out.append(total)
    return torch.stack(out, dim=1)


def mixer(p, h):
    """The mixer from its official parameters."""
    x, z = (h @ p['in_proj.weight'].T).chunk(2, dim=-1)
    x, z = (oracles.silu(symmetric_conv1d(t, p[f'conv1d_{name}.weight'])) for name, t in (('x', x), ('z', z)))
    rank = p['dt_proj.weight'].shape[1]
    dt, B, C = (x @ p['x_proj.weight'].T).split([rank, 8, 8], dim=-1)
    dt = dt @ p['dt_proj.weight'].T + p['dt_proj.bias']
    scanned, _ = oracles.selective_scan(
        x.mT, dt.mT, -torch.exp(p['A_log']), B.mT, C.mT, p['D'], delta_bias=p['dt_proj.bias'], delta_softplus=True
    )
    return torch.cat([scanned.mT, z], dim=-1) @ p['out_proj.weight'].T


def _attention(p, h, heads):
    y = attention(h @ p['qkv.weight'].T + p['qkv.bias'], heads)
    return y @ p['proj.weight'].T + p['proj.bias']


def _token_block_forward(p, x, heads):
    own = below(p, 'mixer.')
    h = oracles.layer_norm(x, p['norm1.weight'], p['norm1.bias'])
    x = x + p.get('gamma_1', 1) * (_attention(own, h, heads) if 'qkv.weight' in own else mixer(own, h))
    h = oracles.layer_norm(x, p['norm2.weight'], p['norm2.bias'])
    h = oracles.gelu(h @ p['mlp.fc1.weight'].T + p['mlp.fc1.bias'])
    return x + p.get('gamma_2', 1) * (h @ p['mlp.fc2.weight'].T + p['mlp.fc2.bias'])


def _in_windows(x, side, blocks):
    """Applies blocks to the tokens of each window of [B, d, H, W], one window after another."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % side, 0, -height % side))
    out = torch.zeros_like(x)
    for top in range(0, x.shape[2], side):
        for left in range(0, x.shape[3], side):
            window = x[:, :, top : top + side, left : left + side]
            tokens = blocks(window.flatten(2).mT)
            out[:, :, top : top + side, left : left + side] = tokens.mT.unflatten(-1, (side, side))
    return out[:, :, :height, :width]


def mambavision_maps(state, images, windows=(2, 2), heads=(2, 2)):
    """Output of every stage before its downsampling, [B, d, h, w]."""
    state = {key: value.double() for key, value in state.items()}
    x = images.double()
    for conv, norm in ((0, 1), (3, 4)):
        x = F.conv2d(x, state[f'patch_embed.conv_down.{conv}.weight'], stride=2, padding=1)
        x = batch_norm(state, f'patch_embed.conv_down.{norm}', x, eps=1e-4).clamp(min=0)
    maps = []
    for i in range(count(state, 'levels.')):
        names = [f'levels.{i}.blocks.{j}.' for j in range(count(state, f'levels.{i}.blocks.'))]
        if i < 2:
            for name in names:
                y = F.conv2d(x, state[f'{name}conv1.weight'], state[f'{name}conv1.bias'], padding=1)
                y = _gelu_tanh(batch_norm(state, f'{name}norm1', y))
                y = F.conv2d(y, state[f'{name}conv2.weight'], state[f'{name}conv2.bias'], padding=1)
                x = x + batch_norm(state, f'{name}norm2', y)
        else:
            parameters = [below(state, name) for name in names]

            def blocks(tokens, parameters=parameters, number=heads[i - 2]):
                for p in parameters:
                    tokens = _token_block_forward(p, tokens, number)
                return tokens

            x = _in_windows(x, windows[i - 2], blocks)
        maps.append(x)
        if f'levels.{i}.downsample.reduction.0.weight' in state:
            x = F.conv2d(x, state[f'levels.{i}.downsample.reduction.0.weight'], stride=2, padding=1)
    return maps


def mambavision_logits(state, images, **kwargs):
    x = mambavision_maps(state, images, **kwargs)[-1]
    state = {key: value.double() for key, value in state.items()}
    x = batch_norm(state, 'norm', x).mean(dim=(2, 3))
    return x @ state['head.weight'].T + state['head.bias']
