"""Features of inner stages and blocks: timm's feature classes, forward_intermediates, pruning."""

import re

import oracles
import pytest
import timm
import torch
from model_cases import CHANNELS, CLASS_TOKENS, FUSED, REDUCTIONS, SMALL, STAGES, images, small
from torch import nn

DEPTH = 4


def blocks(model):
    return list(model.blocks if hasattr(model, 'blocks') else model.stages)


def collected(model, x):
    """What a plain forward pass leaves behind every stage or block, and the final features."""
    outputs = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in blocks(model)]
    final = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return outputs, final


def patches(tokens, grid, class_token=None):
    """Tokens without the class token, by default the middle one, as a map."""
    index = tokens.shape[1] // 2 if class_token is None else class_token
    kept = torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1)
    return kept.transpose(1, 2).unflatten(-1, grid)


def expected_maps(family, model, x):
    return as_maps(family, collected(model, x)[0])


def as_maps(family, outputs):
    """Outputs of blocks on 8x8 patches as maps; those of stages are maps."""
    at = CLASS_TOKENS.get(family)
    return outputs if at is None else [patches(out, (8, 8), at) for out in outputs]


EXTRACTORS = [
    *((family, cls) for family in ('vmamba', 'v0') for cls in ('default', 'list', 'dict', 'hook', 'fx', 'getter')),
    *(('vim', cls) for cls in ('default', 'getter')),
]
OTHERS = [family for family in SMALL if family not in FUSED]


@torch.no_grad()
@pytest.mark.parametrize('family,feature_cls,indices', [
    *((*case, indices) for case in EXTRACTORS for indices in [(0, 1, 2, 3), (1,), (0, 3), (-1,), (-3, -1)]),
    *((family, cls, (0, -2)) for family in OTHERS for cls in ('default', 'getter')),
    *((family, 'fx', (0, -2)) for family in OTHERS if family in STAGES),
], ids=str)  # fmt: skip
def test_feature_extraction(family, indices, feature_cls):
    cls = {} if feature_cls == 'default' else {'feature_cls': feature_cls}
    model = small(family, num_classes=0).eval()
    name, options = SMALL[family]
    options = {**options, **cls, 'num_classes': 0}
    features = timm.create_model(name, features_only=True, out_indices=indices, **options).eval()
    weights = {k: v for k, v in model.state_dict().items()}
    missing = features.load_state_dict(
        {key: weights[own_key(key)] for key in features.state_dict()}, strict=False
    ).missing_keys
    assert not missing
    x = images(2, 3, 32, 32)
    expected = expected_maps(family, model, x)
    chosen = [i % DEPTH for i in indices]
    out = features(x)
    out = list(out.values()) if isinstance(out, dict) else out
    assert len(out) == len(indices)
    for feature, i in zip(out, chosen):
        assert torch.equal(feature, expected[i])
    assert features.feature_info.channels() == [CHANNELS[family][i] for i in chosen]
    assert features.feature_info.reduction() == [REDUCTIONS[family][i] for i in chosen]
    for feature, channels, reduction in zip(out, features.feature_info.channels(), features.feature_info.reduction()):
        assert tuple(feature.shape) == (2, channels, 32 // reduction, 32 // reduction)


def own_key(key):
    """The feature classes prefix the model's name, and write stages.0 as stages_0."""
    key = re.sub(r'^(model|graph_module|body)\.', '', key)
    for i in range(DEPTH):
        key = key.replace(f'stages_{i}.', f'stages.{i}.')
    return key


@torch.no_grad()
@pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
def test_hooks_and_graphs_give_vims_tokens_with_the_class_token(feature_cls):
    name, options = SMALL['vim']
    features = timm.create_model(
        name, features_only=True, feature_cls=feature_cls, out_indices=(1, 3), **{**options, 'num_classes': 0}
    ).eval()
    model, x = small('vim', num_classes=0).eval(), images(2, 3, 32, 32)
    state = {own_key(key).replace('blocks_', 'blocks.'): value for key, value in features.state_dict().items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    outputs, _ = collected(model, x)
    for feature, tokens in zip(features(x), outputs[1::2], strict=True):
        assert torch.equal(feature, tokens)


@pytest.mark.parametrize('feature_cls', ['list', 'dict'])
def test_lists_of_vims_modules_are_an_error_that_names_the_choices(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls must be one of 'getter', 'hook', 'fx', got '{feature_cls}'"):
        small('vim', features_only=True, feature_cls=feature_cls, out_indices=(1, 3))


@torch.no_grad()
@pytest.mark.parametrize('norm', [False, True], ids=['raw', 'norm'])
@pytest.mark.parametrize('indices', [None, 1, 2, (0, 2), [-1], [-4, 1]], ids=str)
@pytest.mark.parametrize('family', SMALL)
def test_forward_intermediates(family, indices, norm):
    model, x = small(family).eval(), images(2, 3, 32, 32)
    outputs, final = collected(model, x)
    if norm and family in CLASS_TOKENS:
        outputs = [model.norm(out) for out in outputs]
    elif norm:
        outputs = [*outputs[:-1], model.norm(outputs[-1])]
    maps = as_maps(family, outputs)
    chosen = range(DEPTH) if indices is None else range(DEPTH - indices, DEPTH) if isinstance(indices, int) else indices
    chosen = sorted(i % DEPTH for i in chosen)
    features, intermediates = model.forward_intermediates(x, indices=indices, norm=norm)
    assert torch.equal(features, final)
    assert len(intermediates) == len(chosen)
    assert all(torch.equal(t, maps[i]) for t, i in zip(intermediates, chosen))
    only = model.forward_intermediates(x, indices=indices, norm=norm, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(only, intermediates))


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_stopping_early_runs_no_more_than_is_needed(family):
    model, x, calls = small(family).eval(), images(2, 3, 32, 32), []
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for i, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda *args, i=i: calls.append(i))
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert calls == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(early, expected))
    features, _ = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert features.shape[1 if family in STAGES else 2] == CHANNELS[family][1]


@torch.no_grad()
def test_vim_gives_tokens_and_class_tokens():
    model, x = small('vim', img_size=(24, 32)).eval(), images(2, 3, 24, 32)
    outputs, _ = collected(model, x)
    maps = model.forward_intermediates(x, intermediates_only=True)
    tokens = model.forward_intermediates(x, intermediates_only=True, output_fmt='NLC')
    pairs = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
    token_pairs = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True, output_fmt='NLC')
    for i, out in enumerate(outputs):
        expected = patches(out, (6, 8))
        assert torch.equal(maps[i], expected)
        assert torch.equal(tokens[i], expected.flatten(2).transpose(1, 2))
        assert torch.equal(pairs[i][0], expected) and torch.equal(pairs[i][1], out[:, 24:25])
        assert torch.equal(token_pairs[i][0], tokens[i]) and torch.equal(token_pairs[i][1], out[:, 24:25])


@pytest.mark.parametrize('family,formats', [('vmamba', ('NHWC', 'NLC')), ('vim', ('NHWC', 'NCL'))])
def test_another_output_format_is_an_error_that_shows_it(family, formats):
    for output_fmt in formats:
        with pytest.raises(ValueError, match=output_fmt):
            small(family).forward_intermediates(images(1, 3, 32, 32), output_fmt=output_fmt)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('indices', [[4], [-5], 5], ids=str)
def test_an_index_out_of_range_is_an_error(family, indices):
    model = small(family)
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(images(1, 3, 32, 32), indices=indices)
    with pytest.raises((AssertionError, ValueError)):
        model.prune_intermediate_layers(indices)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('indices', [(), []], ids=str)
def test_no_index_is_an_error(family, indices):
    model = small(family)
    with pytest.raises(ValueError, match='indices must hold at least one index, got'):
        model.forward_intermediates(images(1, 3, 32, 32), indices=indices)
    with pytest.raises(ValueError, match='indices must hold at least one index, got'):
        model.prune_intermediate_layers(indices)
    modules = 'list' if family in STAGES else 'hook'
    for feature_cls in ({}, dict(feature_cls=modules), dict(feature_cls='getter'), dict(feature_cls='fx')):
        with pytest.raises(ValueError, match='out_indices must hold at least one index, got'):
            small(family, features_only=True, out_indices=indices, **feature_cls)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('indices', ['0123', (1.0,), 1.5], ids=str)
def test_indices_that_are_no_integers_are_an_error(family, indices):
    with pytest.raises(ValueError, match='indices must be an integer or a sequence of integers, got'):
        small(family).forward_intermediates(images(1, 3, 32, 32), indices=indices)
    with pytest.raises(ValueError, match='out_indices must be an integer or a sequence of integers, got'):
        small(family, features_only=True, out_indices=indices)
    with pytest.raises((AssertionError, ValueError), match='99'):
        small(family, features_only=True, out_indices=(0, 99))


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('indices,kept', [([0, 1], 2), ([2], 3), (1, 4), ([-2], 3)], ids=str)
def test_pruning_keeps_the_intermediates(family, indices, kept):
    model, x = small(family).eval(), images(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    total = sum(p.numel() for p in model.parameters())
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    assert len(blocks(model)) == kept
    assert isinstance(model.norm, nn.Identity)
    assert sum(p.numel() for p in model.parameters()) < total
    pruned = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected))
    last = model(x)
    assert last.isfinite().all()
    assert last.shape[1 if family in STAGES else -1] == CHANNELS[family][kept - 1]


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_pruning_without_cutting_blocks_can_keep_norm_and_head(family):
    model, x = small(family).eval(), images(2, 3, 32, 32)
    expected = model(x)
    model.prune_intermediate_layers([0, 3], prune_norm=False, prune_head=False)
    assert torch.equal(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_a_pruned_model_takes_a_new_classifier(family):
    model, x = small(family, dtype=torch.float64).eval(), images(2, 3, 32, 32).double()
    model.prune_intermediate_layers([1])
    assert model.num_features == CHANNELS[family][1]
    model.reset_classifier(7, 'avg')
    model.double()
    assert model(x).shape == (2, 7)


@torch.no_grad()
def test_features_of_odd_images_have_rounded_up_sizes():
    model = small('vmamba', features_only=True).eval()
    shapes = [tuple(f.shape[-2:]) for f in model(images(1, 3, 37, 50))]
    assert shapes == [(10, 13), (5, 7), (3, 4), (2, 2)]


@torch.no_grad()
def test_the_features_of_the_fx_class_equal_the_plain_ones_at_another_batch_size():
    model = small('vmamba', features_only=True, feature_cls='fx', out_indices=(0, 3)).eval()
    x = images(3, 3, 32, 32)
    whole, single = model(x), model(x[:1])
    for a, b in zip(whole, single):
        assert oracles.relative_error(a[:1], b) < 1e-5
