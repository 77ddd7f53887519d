"""Small language models of every kind, for the tests of this folder."""

import torch

from vmamba.sequence import LanguageModel

VOCAB = 53
HYBRID = dict(num_heads=4, num_heads_kv=2, d_conv=4, rotary_emb_dim=2, qkv_proj_bias=False, out_proj_bias=False)
KINDS = {
    'mamba': dict(n_layer=2, ssm_cfg={'d_state': 5}),
    'mamba2': dict(n_layer=2, ssm_cfg={'layer': 'Mamba2', 'headdim': 4, 'd_state': 6, 'ngroups': 2}),
    'mlp': dict(n_layer=2, d_intermediate=40, rms_norm=False, tie_embeddings=False),
    'attention': dict(n_layer=3, attn_layer_idx=[1], attn_cfg=HYBRID),
    's4d-h3': dict(layers=['s4d', ['h3', 'mlp']], layer_cfg={'h3': {'head_dim': 4}, 'mlp': {'d_hidden': 16}}),
}


def make(kind='mamba', **options):
    """A model with random parameters, in evaluation mode."""
    model = LanguageModel(**{**dict(d_model=16, vocab_size=VOCAB), **KINDS[kind], **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def draw(*shape):
    return torch.randint(VOCAB, shape)
