"""The stream through blocks: its dtypes, and what may stand in a module's place."""

import oracles
import pytest
import torch
from model_cases import CLASS_TOKENS, SMALL, images, small, tokens_of
from torch import nn


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_in_the_dtype_of_the_weights(family, dtype):
    model, x = small(family, drop_path_rate=0.3).train().to(dtype), images().to(dtype)
    features, intermediates = model.forward_intermediates(x)
    # The stream of tokens is fp32, that of maps is so within a stage.
    assert {out.dtype for out in intermediates} == {torch.float32 if family in CLASS_TOKENS else dtype}
    assert (features.dtype, model(x).dtype) == (dtype, dtype)


@torch.no_grad()
@pytest.mark.parametrize('family', ['vmamba', 'v0'])
def test_the_stream_within_a_stage_is_not_rounded(family):
    """Many small branches add up, which a map in bf16 would hardly notice."""
    stage = small(family, depths=(32,)).stages[0].eval()
    x = 8 * torch.randn(2, 8, 6, 5).bfloat16()
    expected = stage(x.float())
    once = oracles.relative_error(expected.bfloat16(), expected)
    actual = stage.bfloat16()(x)
    for block in stage.blocks:
        block.register_forward_hook(lambda _, __, out: out.bfloat16().float())
    assert actual.dtype == torch.bfloat16
    assert oracles.relative_error(actual, expected) < 1.5 * once < oracles.relative_error(stage(x), expected)


@torch.no_grad()
def test_another_module_may_stand_in_a_blocks_place():
    model, x = small('vim').eval(), images()
    tokens = model.blocks[3](model.blocks[2](model.blocks[0](tokens_of(model, x))))
    model.blocks[1] = nn.Identity()
    assert torch.equal(model.forward_features(x), model.norm(tokens))


@torch.no_grad()
def test_another_module_may_stand_in_a_norms_place():
    stage, x = small('vmamba').eval().stages[2], images(2, 16, 8, 8)
    stage.blocks[1].norm2 = nn.Identity()
    expected = stage.blocks[0](stage.downsample(x).permute(0, 2, 3, 1))
    expected = expected + stage.blocks[1].mixer(stage.blocks[1].norm1(expected))
    expected = expected + stage.blocks[1].mlp(expected)
    assert oracles.relative_error(stage(x), expected.permute(0, 3, 1, 2)) < 1e-6


@torch.no_grad()
def test_a_layer_scale_multiplies_what_a_mixer_adds():
    plain, scaled = small('vim', depth=1).eval(), small('vim', depth=1, init_values=0.25).eval()
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ['blocks.0.ls.gamma'] and (scaled.blocks[0].ls.gamma == 0.25).all()
    x = tokens_of(plain, images())
    expected = x + 0.25 * (plain.blocks[0](x) - x)
    assert oracles.relative_error(scaled.blocks[0](x), expected) < 1e-5
