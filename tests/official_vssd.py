"""Random checkpoints in the layout of VSSD's files, and what the paper computes from them in float64.

Pixels and heads of the non-causal scans are loops; nothing here imports the library.
"""

import oracles
import torch
import torch.nn.functional as F
from official import add_batch_norm, add_linear, add_norm, attention, batch_norm, below, count, normal


def vssd_state(depths=(1, 1, 1, 1), dim=8, heads=(2, 2, 4, 4), states=6, num_classes=1000):
    state = {}
    half = dim // 2
    convs = {'conv1': (half, 3, 3), 'conv2.0': (half, half, 3), 'conv2.1': (half, half, 3)}
    convs.update({'conv3.0': (4 * dim, half, 3), 'conv3.1': (dim, 4 * dim, 1)})
    for name, (out, into, side) in convs.items():
        add_linear(state, f'patch_embed.{name}.conv', out, into, side, side, bias=False)
        add_batch_norm(state, f'patch_embed.{name}.norm', out)
    for i, depth in enumerate(depths):
        for j in range(depth):
            _block(state, f'layers.{i}.blocks.{j}', dim, heads[i], states, softmax=i == 3)
        if i < len(depths) - 1:
            name = f'layers.{i}.downsample.conv'
            add_linear(state, f'{name}.0.conv', 8 * dim, dim, 1, 1)
            add_linear(state, f'{name}.1.conv', 8 * dim, 1, 3, 3)
            add_linear(state, f'{name}.2.conv', 2 * dim, 8 * dim, 1, 1)
            add_batch_norm(state, f'{name}.2.norm', 2 * dim)
            dim *= 2
    add_norm(state, 'norm', dim)
    add_linear(state, 'head', num_classes, dim)
    return state


def _block(state, name, dim, heads, states, softmax):
    for k in (1, 2):
        add_linear(state, f'{name}.cpe{k}', dim, 1, 3, 3)
        add_norm(state, f'{name}.norm{k}', dim)
    add_linear(state, f'{name}.mlp.fc1', 4 * dim, dim)
    add_linear(state, f'{name}.mlp.fc2', dim, 4 * dim)
    if softmax:
        add_linear(state, f'{name}.attn.to_qkv', 3 * dim, dim, bias=False)
        add_linear(state, f'{name}.attn.to_out', dim, dim)
        return
    inner = 2 * dim
    state[f'{name}.attn.dt_bias'] = normal(heads, mean=-1)
    state[f'{name}.attn.A_log'] = normal(heads, std=0.5)
    state[f'{name}.attn.D'] = normal(heads, mean=1, std=0.3)
    add_linear(state, f'{name}.attn.in_proj', 2 * inner + 2 * states + heads, dim, bias=False)
    add_linear(state, f'{name}.attn.conv2d', inner + 2 * states, 1, 3, 3)
    add_norm(state, f'{name}.attn.norm', inner)
    add_linear(state, f'{name}.attn.out_proj', dim, inner, bias=False)


def mixer(p, h):
    """The non-causal scan of a map [B, h, w, d] from its official parameters."""
    inner, heads = p['norm.weight'].shape[0], p['D'].shape[0]
    channels = p['conv2d.weight'].shape[0]
    z, xBC, dt = (h @ p['in_proj.weight'].T).split([inner, channels, heads], dim=-1)
    xBC = oracles.silu(oracles.depthwise_conv2d(xBC, p['conv2d.weight'][:, 0], p['conv2d.bias'])).flatten(1, 2)
    states = (channels - inner) // 2
    x, B, C = xBC.split([inner, states, states], dim=-1)
    weight = oracles.softplus(dt.flatten(1, 2) + p['dt_bias']) * torch.exp(p['A_log'])
    out, side = [], inner // heads
    for head in range(heads):
        own = x[..., head * side : (head + 1) * side]
        total = 0
        for pixel in range(x.shape[1]):
            total = total + torch.einsum('b,bn,bp->bnp', weight[:, pixel, head], B[:, pixel], own[:, pixel])
        out.append(torch.einsum('bln,bnp->blp', C, total) + p['D'][head] * own)
    y = oracles.layer_norm(torch.cat(out, dim=-1), p['norm.weight'], p['norm.bias']).view(z.shape)
    return (y * z) @ p['out_proj.weight'].T


def _attention(p, h, heads):
    y = attention(h.flatten(1, 2) @ p['to_qkv.weight'].T, heads).view(h.shape)
    return y @ p['to_out.weight'].T + p['to_out.bias']


def _block_forward(p, x, heads):
    own = below(p, 'attn.')
    x = x + oracles.depthwise_conv2d(x, p['cpe1.weight'][:, 0], p['cpe1.bias'])
    h = oracles.layer_norm(x, p['norm1.weight'], p['norm1.bias'])
    x = x + (_attention(own, h, heads) if 'to_qkv.weight' in own else mixer(own, h))
    x = x + oracles.depthwise_conv2d(x, p['cpe2.weight'][:, 0], p['cpe2.bias'])
    h = oracles.layer_norm(x, p['norm2.weight'], p['norm2.bias'])
    h = oracles.gelu(h @ p['mlp.fc1.weight'].T + p['mlp.fc1.bias'])
    return x + h @ p['mlp.fc2.weight'].T + p['mlp.fc2.bias']


def _stem(state, x):
    def layer(name, x, stride=1):
        weight = state[f'patch_embed.{name}.conv.weight']
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return batch_norm(state, f'patch_embed.{name}.norm', x)

    x = layer('conv1', x, 2).clamp(min=0)
    x = x + layer('conv2.1', layer('conv2.0', x).clamp(min=0))
    return layer('conv3.1', layer('conv3.0', x, 2).clamp(min=0))


def _downsample(p, x):
    x = F.conv2d(x, p['0.conv.weight'], p['0.conv.bias']).clamp(min=0)
    x = F.conv2d(x, p['1.conv.weight'], p['1.conv.bias'], stride=2, padding=1, groups=x.shape[1]).clamp(min=0)
    return batch_norm(p, '2.norm', F.conv2d(x, p['2.conv.weight'], p['2.conv.bias']))


def vssd_maps(state, images, heads=4):
    """Output of every stage before its downsampling, [B, d, h, w]; heads of the attention."""
    state = {key: value.double() for key, value in state.items()}
    x, maps = _stem(state, images.double()), []
    for i in range(count(state, 'layers.')):
        x = x.permute(0, 2, 3, 1)
        for j in range(count(state, f'layers.{i}.blocks.')):
            x = _block_forward(below(state, f'layers.{i}.blocks.{j}.'), x, heads)
        x = x.permute(0, 3, 1, 2)
        maps.append(x)
        between = below(state, f'layers.{i}.downsample.conv.')
        x = _downsample(between, x) if between else x
    return maps


def vssd_logits(state, images, **kwargs):
    x = vssd_maps(state, images, **kwargs)[-1].permute(0, 2, 3, 1)
    state = {key: value.double() for key, value in state.items()}
    x = oracles.layer_norm(x, state['norm.weight'], state['norm.bias']).mean(dim=(1, 2))
    return x @ state['head.weight'].T + state['head.bias']
