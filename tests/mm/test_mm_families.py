"""Families besides VMamba and Vim as backbones, against the official definitions."""

import pytest
import torch
from mm_cases import NANO, STAGES, assert_outputs, normalised, with_random_norms
from mmengine.registry import MODELS
from official_adventurer import adventurer_state, adventurer_tokens


def build(kind, variant, options, **kwargs):
    backbone = MODELS.build(dict(type=kind, variant=variant, model_options=options, **kwargs))
    return with_random_norms(backbone)


def dense_file(path, state):
    """The checkpoint of an official detector or segmentor around a backbone."""
    kept = {f'backbone.{key}': v for key, v in state.items() if not key.startswith(('norm.', 'head.'))}
    norms = {f'backbone.outnorm{i}.{kind}': torch.rand(8 * 2**i) for i in range(4) for kind in ('weight', 'bias')}
    torch.save({'state_dict': {**kept, **norms, 'neck.bias': torch.ones(3)}, 'meta': {}}, path)
    return str(path)


@pytest.mark.parametrize('family', ['mambavision', 'vssd'])
def test_stages_of_an_official_dense_checkpoint(tmp_path, family):
    """As the file of `pretrained`; test_mm_checkpoints.py loads whole models."""
    state = STAGES[family][0]()
    dense = dense_file(tmp_path / 'dense.pth', state)
    backbone = build('StageBackbone', f'{family}_nano', NANO[family], out_indices=(1, 2), pretrained=dense)
    backbone.init_weights()
    assert len(backbone.model.stages) == 3
    assert_outputs(backbone, state, family)


@torch.no_grad()
def test_tokens_of_an_official_checkpoint(tmp_path):
    state = adventurer_state(patches=6)
    torch.save({'model': state}, tmp_path / 'adventurer.pth')
    options = dict(img_size=(32, 48), patch_size=16, depth=4, embed_dim=16, d_state=6, headdim=8)
    backbone = build('TokenBackbone', 'adventurer_nano', options, out_indices=(1, 3), out_strides=(16, 16))
    backbone.model.load_state_dict(backbone.model.filter_checkpoint(state), strict=False)
    x = torch.randn(2, 3, 32, 48)
    tokens = adventurer_tokens({**state, 'pos_embed': backbone.model.pos_embed}, x)
    for i, out in zip((1, 3), backbone(x), strict=True):
        reference = normalised(backbone, i, tokens[i][:, :-1].unflatten(1, (2, 3)))
        torch.testing.assert_close(out.double(), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'kind,variant,families', [('StageBackbone', 'vim_nano', 'vssd_t'), ('TokenBackbone', 'vssd_nano', 'adventurer_t')]
)
def test_models_of_the_other_kind_are_errors_that_list_the_known_ones(kind, variant, families):
    with pytest.raises(ValueError, match=f'{variant} is not a .*{families}'):
        MODELS.build(dict(type=kind, variant=variant))
