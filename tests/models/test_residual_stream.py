"""Vim's residual stream between the blocks: the same numbers, whether a block or the next norm makes the sum."""

import oracles
import pytest
import timm
import torch
from recorder import Recorder
from test_timm_api import images, small
from torch import nn
from vmamba.kernels import use_triton
from vmamba.kernels.backend import triton

from vmamba.layers import ResidualStream

OPTIONS = [
    pytest.param({}, id='plain'),
    pytest.param(dict(drop_path_rate=0.6), id='dropping'),
    pytest.param(dict(drop_path_rate=0.6, init_values=0.5), id='dropping-layer-scale'),
]


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
    return [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.blocks]


def stream_types(model, x):
    """What the blocks' mixers are surrounded by: the types that the blocks take, found without hooking them."""
    types, forward = [], type(model.blocks[0]).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.blocks[0]), 'forward', lambda self, x: types.append(type(x)) or forward(self, x))
        model(x)
    return set(types)


@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'autocast'])
@pytest.mark.parametrize('options', OPTIONS)
def test_blocks_that_add_up_give_the_same(options, autocast):
    model, x, seen = small('vim', **options).train(), images(4, 3, 32, 32), []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        assert stream_types(model, x) == {ResidualStream}
        left_to_norms = outputs_and_gradients(model, x)
        watch(model, seen)
        assert stream_types(model, x) == {torch.Tensor}
        added_up = outputs_and_gradients(model, x)
    assert all(out.dtype == torch.float32 for out in seen)
    for ours, theirs in zip(left_to_norms, added_up):
        assert oracles.relative_error(ours, theirs) < (1e-2 if autocast else 1e-5)


@torch.no_grad()
def test_dropped_samples_pass_a_block_unchanged_and_the_others_are_scaled():
    model, x, seen = small('vim', drop_path_rate=0.5).train(), images(16, 3, 32, 32), []
    watch(model, seen)
    model(x)
    block, before, after = model.blocks[-1], seen[-2], seen[-1]
    added = block.mixer(block.norm(before)) / 0.5
    dropped = [torch.equal(a, b) for a, b in zip(after, before)]
    assert 0 < sum(dropped) < 16
    for sample in range(16):
        expected = before[sample] if dropped[sample] else before[sample] + added[sample]
        assert oracles.relative_error(after[sample], expected) < 1e-6


@torch.no_grad()
def test_a_block_alone_takes_tokens_or_a_stream():
    model, x = small('vim').eval(), torch.randn(2, 65, 16)
    block = model.blocks[0]
    expected = x + block.mixer(oracles.rms_norm(x, block.norm.weight))
    assert oracles.relative_error(block(x), expected) < 1e-6
    stream = block(ResidualStream(x))
    assert isinstance(stream, ResidualStream) and stream.scale is None
    assert torch.equal(stream.residual, x)
    assert torch.equal(stream.total(), block(x))
    assert torch.equal(model.blocks(ResidualStream(x)).total(), model.blocks(x))


@torch.no_grad()
@pytest.mark.parametrize('name', ['blocks.2', 'blocks.2.norm', 'norm'])
def test_hooks_see_tensors(name):
    model, x, seen = small('vim').eval(), images(), []
    expected = model(x)
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, inputs, out: seen.extend([*inputs, out]))
    assert torch.equal(model(x), expected)
    assert [type(tensor) for tensor in seen] == [torch.Tensor] * 2


@torch.no_grad()
def test_another_module_may_stand_in_a_blocks_place():
    model, x = small('vim').eval(), images()
    tokens = model.blocks[3](model.blocks[2](model.blocks[0](model.embed(x))))
    model.blocks[1] = nn.Identity()
    assert torch.equal(model.forward_features(x), model.norm(tokens))


def test_checkpoints_keep_the_sum_alone():
    model, x = small('vim').train(), images()
    model.set_grad_checkpointing()
    assert stream_types(model, x) == {torch.Tensor}


@torch.no_grad()
def test_fx_traces_models_that_drop_paths():
    features = small('vim', features_only=True, feature_cls='fx', out_indices=(1, 3), drop_path_rate=0.5)
    x = images()
    torch.manual_seed(1)
    dropping = features.train()(x)
    torch.manual_seed(2)
    assert not torch.equal(features(x)[1], dropping[1])
    assert torch.equal(features.eval()(x)[1], features(x)[1])


@pytest.mark.skipif(triton is None, reason='needs the package triton')
@pytest.mark.parametrize('watched', [False, True], ids=['left-to-norms', 'added-up'])
def test_every_norm_is_a_kernel_of_its_own(watched):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    options = dict(depth=2, embed_dim=16, img_size=16, drop_path_rate=0.3, num_classes=4)
    model, x = timm.create_model('vim_nano', **options).to(device), images(3, 3, 16, 16).to(device)
    results = []
    if watched:
        watch(model, [])
    for triton_kernels in (False, True):
        torch.manual_seed(1)
        with use_triton(triton_kernels), Recorder() as recorder:
            logits = model(x)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
        assert recorder.names.count('add_norm_fused') == (3 if triton_kernels else 0)
    for ours, theirs in zip(*results):
        assert oracles.relative_error(ours, theirs) < 1e-4
