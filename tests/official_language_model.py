"""Mamba language models from their official parameters, in float64. Nothing here imports the library."""

import oracles
import torch
from official_mamba2 import mamba2


def mamba(p, h):
    """The mixer, one token at a time; p has the official names. [B, L, d] -> [B, L, d]"""
    x, z = (h @ p['in_proj.weight'].T + p.get('in_proj.bias', 0)).chunk(2, dim=-1)
    u = oracles.silu(oracles.causal_conv1d(x.mT, p['conv1d.weight'][:, 0], p.get('conv1d.bias'), None)[0].mT)
    rank, states = p['dt_proj.weight'].shape[1], p['A_log'].shape[1]
    dt, B, C = (u @ p['x_proj.weight'].T).split([rank, states, states], dim=-1)
    dt = oracles.softplus(dt @ p['dt_proj.weight'].T + p['dt_proj.bias'])
    state, rows = h.new_zeros(h.shape[0], *p['A_log'].shape), []
    for t in range(h.shape[1]):
        decay = torch.exp(-dt[:, t, :, None] * torch.exp(p['A_log']))
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        rows.append((state * C[:, t, None]).sum(-1) + p['D'] * u[:, t])
    y = torch.stack(rows, dim=1) * oracles.silu(z)
    return y @ p['out_proj.weight'].T + p.get('out_proj.bias', 0)


def language_model(p, ids, n_layer, headdim=None, d_state=None, ngroups=1):
    """Logits [B, L, V] of ids [B, L]; of Mamba-2 if headdim is given, and with an MLP or LayerNorm if p has theirs."""

    def below(prefix):
        return {key[len(prefix) :]: value for key, value in p.items() if key.startswith(prefix)}

    def norm(x, name):
        bias = p.get(f'{name}.bias')
        weight = p[f'{name}.weight']
        return oracles.rms_norm(x, weight) if bias is None else oracles.layer_norm(x, weight, bias)

    h = p['backbone.embedding.weight'][ids]
    for i in range(n_layer):
        layer = f'backbone.layers.{i}'
        mixer, x = below(f'{layer}.mixer.'), norm(h, f'{layer}.norm')
        h = h + (mamba(mixer, x) if headdim is None else mamba2(mixer, x, headdim, d_state, ngroups))
        if f'{layer}.mlp.fc1.weight' in p:
            y, gate = (norm(h, f'{layer}.norm2') @ p[f'{layer}.mlp.fc1.weight'].T).chunk(2, dim=-1)
            h = h + (y * oracles.silu(gate)) @ p[f'{layer}.mlp.fc2.weight'].T
    return norm(h, 'backbone.norm_f') @ p['lm_head.weight'].T
