"""Random checkpoints in the layout of Adventurer's files, and what the released code computes from them in float64."""

import oracles
import torch
import torch.nn.functional as F
from official import add_linear, add_norm, below, count, normal
from official_mamba2 import add_mamba2, mamba2


def adventurer_state(depth=4, dim=16, patches=4, patch_size=16, d_state=6, headdim=8, num_classes=1000):
    state = {'cls_token': normal(1, 1, dim), 'pos_embed': normal(1, patches + 1, dim)}
    add_linear(state, 'patch_embed.proj', dim, 3, patch_size, patch_size)
    for i in range(depth):
        add_norm(state, f'layers.{i}.norm', dim, bias=False)
        add_norm(state, f'layers.{i}.norm_mlp', dim, bias=False)
        add_mamba2(state, f'layers.{i}.mixer', dim, d_state, headdim)
        hidden = int(2.5 * dim)
        add_linear(state, f'layers.{i}.mlp.w1', hidden, dim)
        add_linear(state, f'layers.{i}.mlp.w2', hidden, dim)
        add_linear(state, f'layers.{i}.mlp.w3', dim, hidden)
    add_norm(state, 'norm_f', dim, bias=False)
    add_linear(state, 'head', num_classes, dim)
    return state


def adventurer_tokens(state, images, flipped=(2, 3), d_state=6, headdim=8):
    """The stream after every block [B, L, d]; the class token is last."""
    state = {key: value.double() for key, value in state.items()}
    patch = state['patch_embed.proj.weight'].shape[-1]
    x = F.conv2d(images.double(), state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=patch)
    tokens = [*x.flatten(2).unbind(dim=-1), state['cls_token'][:, 0].expand(len(x), -1)]
    tokens = [token + position for token, position in zip(tokens, state['pos_embed'].unbind(dim=1), strict=True)]
    stream = []
    for i in range(count(state, 'layers.')):
        p = below(state, f'layers.{i}.')
        h = [oracles.rms_norm(token, p['norm.weight']) for token in tokens]
        order = list(range(len(h)))
        if i in flipped:
            order[:-1] = order[-2::-1]
        seen = torch.stack([sum(h) / len(h), *(h[j] for j in order)], dim=1)
        mixed = mamba2(below(p, 'mixer.'), seen, headdim, d_state).unbind(dim=1)[1:]
        for j, out in zip(order, mixed, strict=True):
            tokens[j] = tokens[j] + out
        for j, token in enumerate(tokens):
            n = oracles.rms_norm(token, p['norm_mlp.weight'])
            gate = oracles.silu(n @ p['mlp.w1.weight'].T + p['mlp.w1.bias'])
            hidden = gate * (n @ p['mlp.w2.weight'].T + p['mlp.w2.bias'])
            tokens[j] = token + hidden @ p['mlp.w3.weight'].T + p['mlp.w3.bias']
        stream.append(torch.stack(tokens, dim=1))
    return stream


def adventurer_logits(state, images, **kwargs):
    x = adventurer_tokens(state, images, **kwargs)[-1][:, -1]
    x = oracles.rms_norm(x, state['norm_f.weight'].double())
    return x @ state['head.weight'].double().T + state['head.bias'].double()
