"""Families besides VMamba and Vim as backbones, against the official definitions."""

import pytest
import torch
from mm_cases import normalised, with_random_norms
from mmengine.registry import MODELS
from official_adventurer import adventurer_state, adventurer_tokens
from official_mambavision import mambavision_maps, mambavision_state
from official_vssd import vssd_maps, vssd_state
from torch import nn

STAGES = {
    # variant, options, official state, official maps
    'mambavision': (
        *('mambavision_nano', dict(depths=(1, 1, 2, 2), embed_dim=8, stem_dim=4, num_heads=2, window_size=(4, 3))),
        *(mambavision_state, lambda state, x: mambavision_maps(state, x, windows=(4, 3))),
    ),
    'vssd': (
        *('vssd_nano', dict(depths=(1, 1, 1, 1), embed_dim=8, num_heads=(2, 2, 4, 4), d_state=6)),
        *(vssd_state, vssd_maps),
    ),
}


def build(kind, variant, options, **kwargs):
    backbone = MODELS.build(dict(type=kind, variant=variant, model_options=options, **kwargs))
    return with_random_norms(backbone)


def dense_file(path, state, outputs):
    """The checkpoint of an official detector or segmentor around a backbone."""
    kept = {f'backbone.{key}': v for key, v in state.items() if not key.startswith(('norm.', 'norm_f.', 'head.'))}
    norms = {f'backbone.outnorm{i}.{kind}': torch.rand(8 * 2**i) for i in outputs for kind in ('weight', 'bias')}
    torch.save({'state_dict': {**kept, **norms, 'neck.bias': torch.ones(3)}, 'meta': {}}, path)
    return torch.load(path, weights_only=True)['state_dict']


@torch.no_grad()
@pytest.mark.parametrize('family', STAGES)
def test_stages_of_an_official_dense_checkpoint(tmp_path, family):
    """As a part of a whole model, with its output norms, and as the file of `pretrained`."""
    variant, options, make, maps = STAGES[family]
    state, x = make(), torch.randn(2, 3, 72, 104)
    dense = dense_file(tmp_path / 'dense.pth', state, range(4))
    backbone = build('StageBackbone', variant, options)
    whole = nn.ModuleDict({'backbone': backbone})
    whole.load_state_dict({key: value for key, value in dense.items() if key.startswith('backbone.')})
    assert torch.equal(backbone.outnorm2.weight, dense['backbone.outnorm2.weight'])
    expected = maps(state, x)
    for i, out in enumerate(backbone(x)):
        reference = normalised(backbone, i, expected[i].permute(0, 2, 3, 1))
        torch.testing.assert_close(out.double(), reference, rtol=1e-3, atol=1e-3)
    few = build('StageBackbone', variant, options, out_indices=(1, 2), pretrained=str(tmp_path / 'dense.pth'))
    few.init_weights()
    assert len(few.model.stages) == 3
    for key, value in few.model.state_dict().items():
        assert torch.equal(value, backbone.model.state_dict()[key]), key


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
