"""Random checkpoints in the layouts of the official files, and what the official models compute from them.

The forward passes read the official keys and follow the papers' definitions in float64; they share no code with the
library. Key lists and shapes are those of the released files.
"""

import math
import re

import oracles
import torch
import torch.nn.functional as F


def normal(*shape, mean=0.0, std=1.0):
    return mean + std * torch.randn(*shape)


def _matrix(*shape):
    """Keeps the scale of its input: fan-in is everything but the first dimension."""
    return torch.randn(*shape) / math.sqrt(math.prod(shape[1:]))


def add_norm(state, name, dim, bias=True):
    state[f'{name}.weight'] = normal(dim, mean=1, std=0.2)
    if bias:
        state[f'{name}.bias'] = normal(dim, std=0.2)


def add_linear(state, name, *shape, bias=True):
    state[f'{name}.weight'] = _matrix(*shape)
    if bias:
        state[f'{name}.bias'] = normal(shape[0], std=0.2)


def add_batch_norm(state, name, dim):
    add_norm(state, name, dim)
    state[f'{name}.running_mean'] = normal(dim, std=0.3)
    state[f'{name}.running_var'] = torch.rand(dim) + 0.5
    state[f'{name}.num_batches_tracked'] = torch.tensor(7)


def batch_norm(state, name, x, eps=1e-5):
    """Of a map [B, d, h, w], with the running statistics."""
    mean, var, weight, bias = (
        state[f'{name}.{part}'][:, None, None] for part in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def attention(qkv, heads):
    """Softmax attention of tokens with queries, keys and values [B, L, 3 * d], one head after another."""
    q, k, v = qkv.chunk(3, dim=-1)
    side, out = q.shape[-1] // heads, []
    for head in range(heads):
        own = slice(head * side, (head + 1) * side)
        weights = torch.softmax(q[..., own] @ k[..., own].mT / math.sqrt(side), dim=-1)
        out.append(weights @ v[..., own])
    return torch.cat(out, dim=-1)


def below(state, prefix):
    """The entries whose keys start with the prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def count(state, prefix):
    """One more than the largest number that follows the prefix in a key."""
    return 1 + max(int(key[len(prefix) :].split('.')[0]) for key in state if key.startswith(prefix))


def vmamba_state(depths=(1, 1, 1, 1), embed_dim=8, ssm_ratio=2.0, v0=False, num_classes=1000):
    """A random checkpoint in the release layout of VMamba (N = 1) or of its first version (N = 16)."""
    dstate, state = (16 if v0 else 1), {}
    if v0:
        add_linear(state, 'patch_embed.0', embed_dim, 3, 4, 4)
        add_norm(state, 'patch_embed.2', embed_dim)
    else:
        add_linear(state, 'patch_embed.0', embed_dim // 2, 3, 3, 3)
        add_norm(state, 'patch_embed.2', embed_dim // 2)
        add_linear(state, 'patch_embed.5', embed_dim, embed_dim // 2, 3, 3)
        add_norm(state, 'patch_embed.7', embed_dim)
    for i, depth in enumerate(depths):
        dim = embed_dim * 2**i
        for j in range(depth):
            _vmamba_block(state, f'layers.{i}.blocks.{j}', dim, int(ssm_ratio * dim), dstate, v0)
        if i == len(depths) - 1:
            continue
        if v0:
            add_norm(state, f'layers.{i}.downsample.norm', 4 * dim)
            add_linear(state, f'layers.{i}.downsample.reduction', 2 * dim, 4 * dim, bias=False)
        else:
            add_linear(state, f'layers.{i}.downsample.1', 2 * dim, dim, 3, 3)
            add_norm(state, f'layers.{i}.downsample.3', 2 * dim)
    add_norm(state, 'classifier.norm', dim)
    add_linear(state, 'classifier.head', num_classes, dim)
    return state


def _vmamba_block(state, name, dim, inner, dstate, v0):
    rank = math.ceil(dim / 16)
    add_norm(state, f'{name}.norm', dim)
    op = f'{name}.op'
    add_linear(state, f'{op}.in_proj', 2 * inner if v0 else inner, dim, bias=False)
    add_linear(state, f'{op}.conv2d', inner, 1, 3, 3, bias=v0)
    state[f'{op}.x_proj_weight'] = normal(4, rank + 2 * dstate, inner, std=inner**-0.5)
    state[f'{op}.dt_projs_weight'] = normal(4, inner, rank, std=rank**-0.5)
    state[f'{op}.dt_projs_bias'] = normal(4, inner, mean=-2)
    state[f'{op}.A_logs'] = torch.arange(1.0, dstate + 1).log() + normal(4 * inner, dstate, std=0.3)
    state[f'{op}.Ds'] = normal(4 * inner, mean=1, std=0.3)
    add_norm(state, f'{op}.out_norm', inner)
    add_linear(state, f'{op}.out_proj', dim, inner, bias=False)
    if not v0:
        add_norm(state, f'{name}.norm2', dim)
        add_linear(state, f'{name}.mlp.fc1', 4 * dim, dim)
        add_linear(state, f'{name}.mlp.fc2', dim, 4 * dim)


def vim_state(depth=2, dim=24, patches=4, num_classes=1000, gamma=False, patch_size=16):
    """A random checkpoint in the official layout of Vim."""
    inner, rank, state = 2 * dim, math.ceil(dim / 16), {}
    state['pos_embed'] = normal(1, patches + 1, dim)
    state['cls_token'] = normal(1, 1, dim)
    add_linear(state, 'patch_embed.proj', dim, 3, patch_size, patch_size)
    for i in range(depth):
        add_norm(state, f'layers.{i}.norm', dim, bias=False)
        mixer = f'layers.{i}.mixer'
        add_linear(state, f'{mixer}.in_proj', 2 * inner, dim, bias=False)
        for b in ('', '_b'):
            state[f'{mixer}.A{b}_log'] = torch.arange(1.0, 17).log() + normal(inner, 16, std=0.3)
            state[f'{mixer}.D{b}'] = normal(inner, mean=1, std=0.3)
            add_linear(state, f'{mixer}.conv1d{b}', inner, 1, 4)
            add_linear(state, f'{mixer}.x_proj{b}', rank + 32, inner, bias=False)
            state[f'{mixer}.dt_proj{b}.weight'] = normal(inner, rank, std=rank**-0.5)
            state[f'{mixer}.dt_proj{b}.bias'] = normal(inner, mean=-2)
        add_linear(state, f'{mixer}.out_proj', dim, inner, bias=False)
        if gamma:
            state[f'{mixer}.gamma'] = normal(dim, mean=1, std=0.5)
    add_norm(state, 'norm_f', dim, bias=False)
    add_linear(state, 'head', num_classes, dim)
    return state


def vmamba_maps(state, images):
    """Output of every stage before its downsampling, [B, h, w, d], in float64."""
    state = {key: value.double() for key, value in state.items()}
    x, maps = _vmamba_stem(state, images.double()), []
    stages = 1 + max(int(key.split('.')[1]) for key in state if key.startswith('layers.'))
    for i in range(stages):
        names = {re.match(rf'layers\.{i}\.blocks\.\d+', key) for key in state} - {None}
        for name in sorted({match.group() for match in names}, key=lambda name: int(name.split('.')[-1])):
            block = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f'{name}.')}
            x = _vmamba_block_forward(block, x)
        maps.append(x)
        if i < stages - 1:
            x = _vmamba_downsample(state, f'layers.{i}.downsample', x)
    return maps


def vmamba_logits(state, images):
    """What VMamba computes from a checkpoint in the release layout, in float64."""
    x = vmamba_maps(state, images)[-1]
    state = {key: value.double() for key, value in state.items()}
    x = oracles.layer_norm(x, state['classifier.norm.weight'], state['classifier.norm.bias']).mean(dim=(1, 2))
    return x @ state['classifier.head.weight'].T + state['classifier.head.bias']


def _conv_norm(state, conv, norm, x, **kwargs):
    """[B, C, H, W] -> [B, H', W', C']"""
    x = F.conv2d(x, state[f'{conv}.weight'], state[f'{conv}.bias'], **kwargs).permute(0, 2, 3, 1)
    return oracles.layer_norm(x, state[f'{norm}.weight'], state[f'{norm}.bias'])


def _vmamba_stem(state, images):
    if 'patch_embed.5.weight' not in state:
        return _conv_norm(state, 'patch_embed.0', 'patch_embed.2', images, stride=4)
    x = oracles.gelu(_conv_norm(state, 'patch_embed.0', 'patch_embed.2', images, stride=2, padding=1))
    return _conv_norm(state, 'patch_embed.5', 'patch_embed.7', x.permute(0, 3, 1, 2), stride=2, padding=1)


def _vmamba_downsample(state, name, x):
    if f'{name}.reduction.weight' not in state:
        return _conv_norm(state, f'{name}.1', f'{name}.3', x.permute(0, 3, 1, 2), stride=2, padding=1)
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = torch.cat([x[:, h::2, w::2] for h, w in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
    return oracles.layer_norm(x, state[f'{name}.norm.weight'], state[f'{name}.norm.bias']) @ (
        state[f'{name}.reduction.weight'].T
    )


def _vmamba_block_forward(block, x):
    op = {key[len('op.') :]: value for key, value in block.items() if key.startswith('op.')}
    x = x + ss2d(op, oracles.layer_norm(x, block['norm.weight'], block['norm.bias']))
    if 'mlp.fc1.weight' not in block:
        return x
    hidden = oracles.layer_norm(x, block['norm2.weight'], block['norm2.bias'])
    hidden = oracles.gelu(hidden @ block['mlp.fc1.weight'].T + block['mlp.fc1.bias'])
    return x + hidden @ block['mlp.fc2.weight'].T + block['mlp.fc2.bias']


def ss2d(op, x):
    """The mixer of VMamba from its official parameters; the gate is there if in_proj is twice as wide."""
    inner = op['conv2d.weight'].shape[0]
    x = x @ op['in_proj.weight'].T
    x, z = (x, None) if x.shape[-1] == inner else x.chunk(2, dim=-1)
    padding = op['conv2d.weight'].shape[-1] // 2
    conv = F.conv2d(x.permute(0, 3, 1, 2), op['conv2d.weight'], op.get('conv2d.bias'), padding=padding, groups=inner)
    x = oracles.silu(conv.permute(0, 2, 3, 1))
    x_dbl = torch.einsum('kcd,bhwd->bhwkc', op['x_proj_weight'], x)
    A = -torch.exp(op['A_logs']).reshape(4, inner, -1)
    y = oracles.ss2d_scan(x, x_dbl, op['dt_projs_weight'], op['dt_projs_bias'], A, op['Ds'].reshape(4, inner))
    y = oracles.layer_norm(y, op['out_norm.weight'], op['out_norm.bias'])
    if z is not None:
        y = y * oracles.silu(z)
    return y @ op['out_proj.weight'].T


def vim_tokens(state, images, stride=16):
    """The residual stream after every block [B, L, d], in float64; the class token stands in the middle."""
    state = {key: value.double() for key, value in state.items()}
    x = F.conv2d(images.double(), state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=stride)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], state['cls_token'].expand(len(x), 1, -1), x[:, middle:]], dim=1)
    hidden, residual, stream = x + state['pos_embed'], 0, []
    for i in range(sum(bool(re.fullmatch(r'layers\.\d+\.norm\.weight', key)) for key in state)):
        residual = hidden + residual
        mixer = {key.split('.', 3)[3]: value for key, value in state.items() if key.startswith(f'layers.{i}.mixer.')}
        hidden = bimamba(mixer, oracles.rms_norm(residual, state[f'layers.{i}.norm.weight']))
        stream.append(hidden + residual)
    return stream


def vim_logits(state, images, stride=16):
    """What Vim computes from an official checkpoint, in float64."""
    x = vim_tokens(state, images, stride)[-1]
    x = oracles.rms_norm(x, state['norm_f.weight'].double())[:, (x.shape[1] - 1) // 2]
    return x @ state['head.weight'].double().T + state['head.bias'].double()


def bimamba(mixer, h):
    """The mixer of Vim from its official parameters."""
    x, z = (h @ mixer['in_proj.weight'].T).chunk(2, dim=-1)
    forward = _mamba_direction(mixer, '', x, z)
    backward = _mamba_direction(mixer, '_b', x.flip(1), z.flip(1)).flip(1)
    out = (forward + backward) / 2 @ mixer['out_proj.weight'].T
    return out * mixer['gamma'] if 'gamma' in mixer else out


def _mamba_direction(mixer, b, x, z):
    rank, dstate = mixer[f'dt_proj{b}.weight'].shape[1], mixer[f'A{b}_log'].shape[1]
    u = oracles.silu(_causal_conv1d(x, mixer[f'conv1d{b}.weight'], mixer[f'conv1d{b}.bias']))
    dt, B, C = (u @ mixer[f'x_proj{b}.weight'].T).split([rank, dstate, dstate], dim=-1)
    y, _ = oracles.selective_scan(
        u.transpose(1, 2),
        (dt @ mixer[f'dt_proj{b}.weight'].T).transpose(1, 2),
        -torch.exp(mixer[f'A{b}_log']),
        B.transpose(1, 2),
        C.transpose(1, 2),
        mixer[f'D{b}'],
        z=z.transpose(1, 2),
        delta_bias=mixer[f'dt_proj{b}.bias'],
        delta_softplus=True,
    )
    return y.transpose(1, 2)


def _causal_conv1d(x, weight, bias):
    """[B, L, D] with a weight [D, 1, width]"""
    return oracles.causal_conv1d(x.mT, weight.squeeze(1), bias)[0].mT
