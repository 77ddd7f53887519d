"""timm's model interface: classifiers, training, parameter groups, persistence."""

import copy
import pickle

import oracles
import pytest
import timm
import torch
from model_cases import CHANNELS, CLASS_TOKENS, FUSED, SMALL, STAGES, images, small
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

CURRENT = ['vmamba_t', 'vmamba_s', 'vmamba_b', 'vmamba_t_s2l5', 'vmamba_s_s1l20', 'vmamba_b_s1l20']
V0 = ['vmamba_t_v0', 'vmamba_s_v0', 'vmamba_b_v0']
VIM = ['vim_t', 'vim_t_stride8', 'vim_s', 'vim_s_stride8', 'vim_b']


@torch.no_grad()
@pytest.mark.parametrize('name', [*CURRENT, *V0, *VIM])
def test_every_variant_runs_when_shrunk_in_depth(name):
    shrunk = dict(depth=2, img_size=64) if name in VIM else dict(depths=(1, 1, 1, 1))
    model = timm.create_model(name, **shrunk).eval()
    y = model(images(2, 3, 64, 64))
    assert y.shape == (2, 1000)
    assert y.isfinite().all()
    assert y[0].std() > 1e-3
    assert oracles.relative_error(y[:1], model(images(2, 3, 64, 64))[:1]) > 1e-3, 'the image matters'


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_features_head_and_logits_fit_together(family):
    model, x = small(family).eval(), images()
    features = model.forward_features(x)
    assert features.shape == ((2, 65, 16) if family in CLASS_TOKENS else (2, 64, 1, 1))
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert model.num_features == model.head_hidden_size == CHANNELS[family][-1]
    assert torch.equal(model.get_classifier()(pooled), model(x))
    expected = features[:, CLASS_TOKENS[family]] if family in CLASS_TOKENS else features.mean(dim=(2, 3))
    assert oracles.relative_error(pooled, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('late', [False, True], ids=['at-creation', 'by-reset'])
def test_without_classifier_or_pooling(family, late):
    x = images()

    def variant(**kwargs):
        if not late:
            return small(family, **kwargs).eval()
        model = small(family).eval()
        model.reset_classifier(**{'num_classes': 10, **kwargs})
        return model

    model = variant(num_classes=0)
    assert model.num_classes == 0
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    unpooled = variant(num_classes=0, global_pool='')
    assert torch.equal(unpooled(x), unpooled.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize('family', STAGES)
def test_a_classifier_without_pooling_gives_a_map_of_logits(family):
    x = images(2, 3, 64, 64)

    def assert_pixelwise(model):
        features, classifier = model.forward_features(x), model.get_classifier()
        assert torch.equal(model.forward_head(features, pre_logits=True), features)
        weight = classifier.weight.flatten(1)
        expected = torch.einsum('bdhw,cd->bchw', features, weight) + classifier.bias[:, None, None]
        assert model(x).shape == (2, 10, *features.shape[2:])
        assert oracles.relative_error(model(x), expected) < 1e-5
        assert 0.015 < weight.std() < 0.025 and not classifier.bias.any()

    assert_pixelwise(small(family, global_pool='').eval())
    model = small(family, num_classes=0, global_pool='').eval()
    model.reset_classifier(10)
    assert_pixelwise(model)
    weight = model.get_classifier().weight.clone()
    model.init_weights()
    assert_pixelwise(model)
    assert not torch.equal(model.get_classifier().weight, weight)
    model.reset_classifier(10, 'avg')
    assert model(x).shape == (2, 10)
    model.reset_classifier(10, '')
    assert_pixelwise(model)
    model.prune_intermediate_layers([1])
    model.reset_classifier(10)
    assert_pixelwise(model)


@torch.no_grad()
def test_vim_pools_the_patches_or_no_tokens():
    model, x = small('vim').eval(), images()
    tokens = model.forward_features(x)
    model.reset_classifier(10, 'avg')
    patches = torch.cat([tokens[:, :32], tokens[:, 33:]], dim=1)
    assert oracles.relative_error(model(x), model.head(patches.mean(dim=1))) < 1e-5
    model.reset_classifier(10, '')
    assert model(x).shape == (2, 65, 10)


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_reset_classifier_makes_a_fresh_one(family):
    model = small(family, dtype=torch.float64).eval()
    old = model.get_classifier().weight
    model.reset_classifier(7)
    classifier = model.get_classifier()
    assert (model.num_classes, classifier.weight.shape) == (7, (7, old.shape[1]))
    assert model(images().double()).shape == (2, 7)
    assert classifier.weight.dtype == torch.float64
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model(images().double()).shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('in_chans', [1, 5])
def test_image_channels(family, in_chans):
    model = small(family, in_chans=in_chans).eval()
    x = images(2, in_chans, 32, 32)
    changed = x.clone()
    changed[:, -1] += 1
    assert oracles.relative_error(model(changed), model(x)) > 1e-3
    with pytest.raises(ValueError, match='got 3'):
        model(images())


@pytest.mark.parametrize('family,options', [
    *((family, {}) for family in SMALL),
    *((family, dict(drop_path_rate=0.5, drop_rate=0.1)) for family in FUSED),
], ids=str)  # fmt: skip
def test_training_reduces_the_loss_and_reaches_every_parameter(family, options):
    model = small(family, **options).train()
    size = 32 if family in CLASS_TOKENS else 64  # the last map needs several pixels for its decays to matter
    x, target = images(8, 3, size, size), torch.arange(8) % 4
    optimizer = create_optimizer_v2(model, 'adamw', lr=3e-3, weight_decay=0.05)
    losses, seen = [], {name: 0.0 for name, _ in model.named_parameters()}
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f'{name} is unused'
            seen[name] += parameter.grad.abs().sum().item()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0] - 0.2
    assert [name for name, total in seen.items() if not total > 0] == []


@pytest.mark.parametrize('family', SMALL)
def test_stochastic_depth_and_dropout_act_in_training_only(family):
    x = images()
    for options in (dict(drop_path_rate=0.9), dict(drop_rate=0.5)):
        model = small(family, **options)
        with torch.no_grad():
            torch.manual_seed(1)
            assert not torch.equal(model.train()(x), model(x))
            assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize('family', SMALL)
def test_checkpointing_changes_neither_outputs_nor_gradients(family):
    model, x = small(family).train(), images()
    plain = model(x)
    plain.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    recomputed = []
    block = model.blocks[1] if family in CLASS_TOKENS else model.stages[2].blocks[0]
    block.register_forward_pre_hook(lambda *args: recomputed.append(1))
    model.set_grad_checkpointing()
    y = model(x)
    y.square().sum().backward()
    assert len(recomputed) == 2
    assert torch.equal(y, plain)
    for name, parameter in model.named_parameters():
        assert oracles.relative_error(parameter.grad, grads[name]) < 1e-5, name
    model.set_grad_checkpointing(False)
    model(x).sum().backward()
    assert len(recomputed) == 3


@pytest.mark.parametrize('family', SMALL)
def test_parameters_without_weight_decay(family):
    model = small(family)
    names = dict(model.named_parameters())
    exempt = model.no_weight_decay()
    assert exempt <= names.keys()
    for name in names:
        last = name.split('.')[-1]
        if last in ('A_log', 'D', 'dt_proj_bias', 'dt_bias', 'pos_embed', 'cls_token'):
            assert name in exempt, name
        if last == 'weight' and names[name].ndim > 1 or last == 'dt_proj_weight':
            assert name not in exempt, name
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)
    assert (free['weight_decay'], decayed['weight_decay']) == (0.0, 0.05)
    decayed = {id(p) for p in decayed['params']}
    expected = {id(p) for name, p in names.items() if p.ndim > 1 and name not in exempt}
    assert decayed == expected
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05).param_groups
    assert {id(p) for group in groups if group['weight_decay'] for p in group['params']} == expected


def first_to_last(family, model):
    """Prefixes of parameter names from the input to the output of a model."""
    if family in CLASS_TOKENS:
        blocks = [f'blocks.{i}.' for i in range(len(model.blocks))]
        return [('patch_embed.', 'cls_token', 'pos_embed'), *blocks, 'norm.', 'head.']
    order = ['stem.']
    for i, stage in enumerate(model.stages):
        order += [f'stages.{i}.downsample.', *(f'stages.{i}.blocks.{j}.' for j in range(len(stage.blocks)))]
    return [*order, 'norm.', 'head.']


@pytest.mark.parametrize('family', SMALL)
def test_layer_groups_are_complete_and_ordered(family):
    model = small(family)
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    order = first_to_last(family, model)
    position = {name: next(i for i, prefix in enumerate(order) if name.startswith(prefix)) for name in groups}
    names = sorted(groups, key=position.get)
    layers = [groups[name] for name in names]
    assert layers == sorted(layers), 'a later layer has an earlier group'
    blocks = [prefix for prefix in order if 'blocks' in prefix]
    of_block = [{groups[name] for name in groups if name.startswith(prefix)} for prefix in blocks]
    assert all(len(layer) == 1 for layer in of_block)
    assert len(set.union(*of_block)) == len(blocks), 'blocks share a group'
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse.keys() == groups.keys()


@pytest.mark.parametrize('family', SMALL)
def test_layer_decay_lowers_the_rate_towards_the_input(family):
    model = small(family)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    names = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in names.values()}
    order = first_to_last(family, model)
    scales = [
        [scale[id(p)] for name, p in names.items() if name.startswith(prefix)]
        for prefix in order
        if 'down' not in prefix
    ]
    assert all(min(later) >= max(earlier) for earlier, later in zip(scales, scales[1:]))
    assert max(scales[0]) < 0.2
    assert set(scales[-1]) == {1.0}


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_a_state_dict_a_copy_and_a_pickle_carry_the_model(family):
    model, x = small(family).eval(), images()
    expected = model(x)
    other = small(family).eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.parametrize('family', SMALL)
def test_device_and_dtype_at_creation(family):
    for device, dtype in (('meta', torch.bfloat16), ('cpu', torch.float64), ('cpu', torch.bfloat16)):
        model = small(family, device=device, dtype=dtype)
        found = {(t.device.type, t.dtype) for t in model.state_dict().values() if t.is_floating_point()}
        assert found == {(device, dtype)}
    with torch.device('meta'):
        assert {t.device.type for t in small(family).state_dict().values()} == {'meta'}
