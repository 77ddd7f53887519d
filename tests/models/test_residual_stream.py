"""The residual stream between the blocks: the same numbers, whether a block or the next norm makes the sum."""

import oracles
import pytest
import timm
import torch
from recorder import Recorder
from test_timm_api import SMALL, images, small
from torch import nn
from vmamba.kernels import use_triton
from vmamba.kernels.backend import triton

from vmamba.layers import ResidualStream
from vmamba.models import vim, vmamba

CASES = [
    *(pytest.param(family, {}, id=family) for family in SMALL),
    *(pytest.param(family, dict(drop_path_rate=0.6), id=f'{family}-dropping') for family in SMALL),
    pytest.param('vim', dict(drop_path_rate=0.6, init_values=0.5), id='vim-dropping-layer-scale'),
]


def blocks(model):
    return list(
        model.blocks if hasattr(model, 'blocks') else (block for stage in model.stages for block in stage.blocks)
    )


def branches(block):
    """Pairs of a norm and what follows it."""
    if hasattr(block, 'norm'):
        return [(block.norm, block.mixer)]
    return [(block.norm1, block.mixer), *([(block.norm2, block.mlp)] if block.has_mlp else [])]


def outputs_and_gradients(model, x):
    model.zero_grad()
    torch.manual_seed(1)
    features, intermediates = model.forward_intermediates(x, indices=[0, 2])
    torch.manual_seed(1)
    logits = model(x)
    (logits.square().sum() + features.square().sum() + intermediates[1].sum()).backward()
    return [logits, features, *intermediates, *(p.grad.clone() for p in model.parameters())]


def watch(model, seen):
    """Hooks the blocks, which makes them add up what they return."""
    return [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in blocks(model)]


def stream_types(model, x):
    """What the blocks' mixers are surrounded by: the types that the blocks take, found without hooking them."""
    types, kind = [], type(blocks(model)[0])
    forward = kind.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, 'forward', lambda self, x: types.append(type(x)) or forward(self, x))
        model(x)
    return set(types)


@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'autocast'])
@pytest.mark.parametrize('family,options', CASES)
def test_blocks_that_add_up_give_the_same(family, options, autocast):
    size = 32 if family == 'vim' else 64  # on a map of one pixel a decay has no gradient
    model, x, seen = small(family, **options).train(), images(4, 3, size, size), []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert stream_types(model, x) == {ResidualStream}
        left_to_norms = outputs_and_gradients(model, x)
        watch(model, seen)
        assert stream_types(model, x) == {torch.Tensor}
        added_up = outputs_and_gradients(model, x)
    # Of v0 the first stage alone takes a map that is not rounded, and blocks that add up round it again.
    assert {out.dtype for out in (seen[:1] if family == 'v0' else seen)} == {torch.float32}
    bound = 1e-5 if not autocast else 4e-2 if family == 'v0' else 1e-2
    for ours, theirs in zip(left_to_norms, added_up, strict=True):
        assert ours.dtype == theirs.dtype
        assert oracles.relative_error(ours, theirs) < bound


BLOCKS = [
    pytest.param(lambda **options: vim.VimBlock(16, **options), (6, 16), id='vim'),
    pytest.param(lambda **options: vmamba.VMambaBlock(16, **options), (3, 2, 16), id='vmamba'),
    pytest.param(lambda **options: vmamba.VMambaBlock(16, mlp_ratio=0.0, **options), (3, 2, 16), id='v0'),
]


def expected_outputs(block, sample, factor):
    """What a block can make of one sample [1, ..., d], its branches dropped or scaled by `factor`."""
    outputs = [sample]
    for norm, branch in branches(block):
        weights = [parameter.double() for parameter in norm.parameters()]
        definition = oracles.layer_norm if len(weights) == 2 else oracles.rms_norm
        added = [factor * branch(definition(x.double(), *weights).float()) for x in outputs]
        outputs += [x + change for x, change in zip(outputs, added)]
    return outputs


@torch.no_grad()
@pytest.mark.parametrize('streaming', [False, True], ids=['tensor', 'stream'])
@pytest.mark.parametrize('build,shape', BLOCKS)
def test_dropped_samples_pass_a_block_unchanged_and_the_others_are_scaled(build, shape, streaming):
    block, x = build(drop_path=0.5).train(), torch.randn(24, *shape)
    y = block(ResidualStream(x)).total() if streaming else block(x)
    cases = []
    for sample in range(24):
        expected = expected_outputs(block, x[sample : sample + 1], 2)
        errors = [oracles.relative_error(y[sample : sample + 1], outcome) for outcome in expected]
        cases.append(errors.index(min(errors)))
        assert min(errors) < 1e-5
    assert set(cases) == set(range(len(expected))), 'each branch is dropped and kept'


@torch.no_grad()
@pytest.mark.parametrize('build,shape', BLOCKS)
def test_a_block_alone_takes_a_tensor_or_a_stream(build, shape):
    block, x = build().eval(), torch.randn(2, *shape)
    assert oracles.relative_error(block(x), expected_outputs(block, x, 1)[-1]) < 1e-5
    stream = block(ResidualStream(x))
    assert isinstance(stream, ResidualStream) and stream.scale is None
    assert (len(block.norms()) > 1) != torch.equal(stream.residual, x)
    assert torch.equal(stream.total(), block(x))
    twice = nn.Sequential(block, build().eval())
    assert torch.equal(twice(ResidualStream(x)).total(), twice(x))


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_in_the_dtype_of_the_weights(family, dtype):
    model, x = small(family, drop_path_rate=0.3).train().to(dtype), images().to(dtype)
    features, intermediates = model.forward_intermediates(x)
    if family != 'vim':  # whose stream is fp32
        assert {out.dtype for out in intermediates} == {dtype}
    assert (features.dtype, model(x).dtype) == (dtype, dtype)


@torch.no_grad()
@pytest.mark.parametrize('family', ['vmamba', 'v0'])
def test_the_stream_within_a_stage_is_not_rounded(family):
    """Many small branches add up, which a map in bf16 would hardly notice."""
    stage = small(family, depths=(32,)).stages[0].eval().bfloat16()
    x = 8 * torch.randn(2, 8, 6, 5).bfloat16()
    expected = stage.float()(x.float())
    actual = stage.bfloat16()(x)
    assert actual.dtype == torch.bfloat16
    once = oracles.relative_error(expected.bfloat16(), expected)
    stage.blocks[0].register_forward_hook(lambda *args: None)
    assert oracles.relative_error(actual, expected) < 1.5 * once < oracles.relative_error(stage(x), expected)


WATCHED = [
    *(('vim', name) for name in ('blocks.2', 'blocks.2.norm', 'norm')),
    *(('vmamba', f'stages.2.{name}') for name in ('blocks.1', 'blocks.0.norm1', 'blocks.1.norm2', 'blocks.0.mixer')),
    *(('vmamba', name) for name in ('stem.norm1', 'norm')),
    *(('v0', f'stages.2.{name}') for name in ('blocks.1', 'blocks.1.norm1', 'downsample.norm')),
]


@torch.no_grad()
@pytest.mark.parametrize('family,name', WATCHED)
def test_hooks_see_tensors(family, name):
    model, x, seen = small(family).eval(), images(), []
    expected = model(x)
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, inputs, out: seen.extend([*inputs, out]))
    assert torch.equal(model(x), expected)
    assert [type(tensor) for tensor in seen] == [torch.Tensor] * 2


@torch.no_grad()
def test_another_module_may_stand_in_a_blocks_or_norms_place():
    model, x = small('vim').eval(), images()
    tokens = model.blocks[3](model.blocks[2](model.blocks[0](model.embed(x))))
    model.blocks[1] = nn.Identity()
    assert torch.equal(model.forward_features(x), model.norm(tokens))
    model = small('vmamba').eval()
    stage, x = model.stages[2], images(2, 16, 8, 8)
    stage.blocks[1].norm2 = nn.Identity()
    expected = stage.blocks[0](stage.downsample(x).permute(0, 2, 3, 1))
    expected = expected + stage.blocks[1].mixer(stage.blocks[1].norm1(expected))
    expected = expected + stage.blocks[1].mlp(expected)
    assert oracles.relative_error(stage(x), expected.permute(0, 3, 1, 2)) < 1e-6


@pytest.mark.parametrize('family', SMALL)
def test_checkpoints_keep_the_sum_alone(family):
    model, x = small(family).train(), images()
    model.set_grad_checkpointing()
    assert stream_types(model, x) == {torch.Tensor}


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_fx_traces_models_that_drop_paths(family):
    features = small(family, features_only=True, feature_cls='fx', out_indices=(1, 3), drop_path_rate=0.5)
    x = images()
    torch.manual_seed(1)
    dropping = features.train()(x)
    torch.manual_seed(2)
    assert not torch.equal(features(x)[1], dropping[1])
    assert torch.equal(features.eval()(x)[1], features(x)[1])


@pytest.mark.skipif(triton is None, reason='needs the package triton')
@pytest.mark.parametrize('watched', [False, True], ids=['left-to-norms', 'added-up'])
@pytest.mark.parametrize('name,options,norms', [
    pytest.param('vim_nano', dict(depth=2, embed_dim=16, img_size=16), 3, id='vim'),
    pytest.param('vmamba_nano', dict(depths=(1, 1), embed_dim=8), 3 + 4 + 1, id='vmamba'),
    pytest.param('vmamba_t_v0', dict(depths=(1, 1), embed_dim=4, d_state=2), 2 + 2 + 1, id='v0'),
])  # fmt: skip
def test_every_norm_is_a_kernel_of_its_own(name, options, norms, watched):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = timm.create_model(name, drop_path_rate=0.3, num_classes=4, **options).to(device)
    x = images(3, 3, 16, 16).to(device)
    results = []
    if watched:
        watch(model, [])
    for triton_kernels in (False, True):
        torch.manual_seed(1)
        with use_triton(triton_kernels), Recorder() as recorder:
            logits = model(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
        assert recorder.names.count('add_norm_fused') == (norms if triton_kernels else 0)
    for ours, theirs in zip(*results):
        assert oracles.relative_error(ours, theirs) < 1e-4
