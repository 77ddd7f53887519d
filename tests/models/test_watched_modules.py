"""Modules that operators bypass on every device are called where something looks at them or stands in their place."""

import copy

import oracles
import pytest
import torch
from model_cases import SMALL, images, small
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

MIXER = 'stages.0.blocks.0.mixer'
BYPASSED = [
    *((family, f'{MIXER}.{name}') for family in ('vmamba', 'v0') for name in ('conv2d', 'x_proj', 'out_norm')),
    ('vim', 'patch_embed.proj'),
]


class Adapter(nn.Module):
    """Adds something to what a module computes, with that module's weight, as low-rank adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.scale


@torch.no_grad()
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'autocast'])
@pytest.mark.parametrize('family,name', BYPASSED)
def test_a_hook_sees_the_call_and_changes_nothing(family, name, autocast):
    model, x, seen = small(family).eval(), images(), []
    module = model.get_submodule(name)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        expected = model(x)
        handle = module.register_forward_hook(lambda *args: seen.append(args[-1]))
        assert oracles.relative_error(model(x), expected) < (3e-2 if autocast else 1e-5)
        assert len(seen) == 1
        handle.remove()
        assert torch.equal(model(x), expected)
        assert len(seen) == 1


@pytest.mark.parametrize('family,name', BYPASSED)
def test_an_adapter_is_called_and_trained(family, name):
    model, x = small(family).eval(), images()
    expected = model(x)
    parent, _, child = name.rpartition('.')
    adapter = Adapter(model.get_submodule(name))
    setattr(model.get_submodule(parent), child, adapter)
    y = model(x)
    assert oracles.relative_error(y, expected) > 1e-4
    y.square().sum().backward()
    assert adapter.scale.grad.abs() > 0
    adapter.scale.data.zero_()
    assert oracles.relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize('family', SMALL)
def test_pruned_weights_are_trained(family):
    model, x = small(family), images()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            prune.l1_unstructured(module, 'weight', 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()


@pytest.mark.parametrize('family,name', BYPASSED)
def test_parametrised_weights_give_the_same_and_are_trained(family, name):
    model, x = small(family), images()
    expected = model(x)
    module = model.get_submodule(name)
    parametrizations.weight_norm(module, dim=0 if module.weight.ndim > 1 else None)
    y = model(x)
    assert oracles.relative_error(y, expected) < 1e-4
    y.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize('family', ['vmamba', 'v0'])
def test_a_bias_of_the_projections_is_added(family):
    model, x = small(family).eval(), images()
    expected = model(x)
    mixer = model.stages[0].blocks[0].mixer
    weight = mixer.x_proj.weight
    mixer.x_proj = nn.Linear(weight.shape[1], weight.shape[0])
    mixer.x_proj.weight.copy_(weight)
    mixer.x_proj.bias.fill_(3.0)
    with_bias = model(x)
    assert oracles.relative_error(with_bias, expected) > 1e-4
    mixer.x_proj.bias.zero_()
    assert oracles.relative_error(model(x), expected) < 1e-5


CONVOLUTIONS = [
    *(
        (family, f'{MIXER}.conv2d', options)
        for family in ('vmamba', 'v0')
        for options in (
            dict(dilation=2, padding=2),
            dict(padding=1, padding_mode='circular'),
            dict(kernel_size=(3, 1), padding=(1, 0)),
            dict(padding=1, groups=1),
        )
    ),
    ('vim', 'patch_embed.proj', dict(groups=2)),
    ('vim', 'patch_embed.proj', dict(padding=2, dilation=2, kernel_size=3)),
    ('vim', 'patch_embed.proj', dict(padding=1, kernel_size=6)),
]


@torch.no_grad()
@pytest.mark.parametrize('family,name,changed', CONVOLUTIONS, ids=str)
def test_another_convolution_is_computed_as_it_is(family, name, changed):
    model, x = small(family, in_chans=4).eval(), images(2, 4, 32, 32)
    parent, _, child = name.rpartition('.')
    old = model.get_submodule(name)
    options = dict(kernel_size=old.kernel_size, stride=old.stride, groups=old.groups, bias=old.bias is not None)
    conv = nn.Conv2d(old.in_channels, old.out_channels, **{**options, **changed})
    setattr(model.get_submodule(parent), child, conv)
    actual = model(x)
    conv.register_forward_hook(lambda *args: None)
    assert oracles.relative_error(actual, model(x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize('family', SMALL)
def test_hooks_of_all_modules_see_tensors(family):
    model, x, seen = small(family, drop_path_rate=0.5).eval(), images(), {}
    expected = model(x)
    handle = register_module_forward_hook(lambda module, inputs, out: seen.update({module: (*inputs, out)}))
    try:
        assert oracles.relative_error(model(x), expected) < 1e-5
    finally:
        handle.remove()
    assert all(type(tensor) is torch.Tensor for tensors in seen.values() for tensor in tensors)
    # Dropout of attention weights is an argument of the fused attention.
    assert seen.keys() == {module for name, module in model.named_modules() if not name.endswith('.attn_drop')}


@torch.no_grad()
@pytest.mark.parametrize('family,name', [('vmamba', 'stages.2.blocks'), ('v0', 'stages.2.blocks'), ('vim', 'blocks')])
def test_hooks_of_a_container_of_blocks_see_tensors(family, name):
    model, x, seen = small(family).eval(), images(), []
    expected = model(x)
    blocks = model.get_submodule(name)
    handle = blocks.register_forward_hook(lambda module, inputs, out: seen.extend([*inputs, out]))
    assert oracles.relative_error(model(x), expected) < 1e-5
    assert [type(tensor) for tensor in seen] == [torch.Tensor] * 2
    handle.remove()
    blocks.register_forward_hook(lambda module, inputs, out: out.flip(-1))
    assert oracles.relative_error(model(x), expected) > 1e-4
    if family != 'vim':
        assert torch.equal(model.forward_intermediates(x)[0], model.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize(
    'family,name', [*BYPASSED, ('vim', 'blocks.1'), ('vim', 'norm'), ('vmamba', 'stages.2.blocks.1.norm2')]
)
def test_a_forward_that_is_put_in_place_sees_tensors(family, name):
    model, x, seen = small(family).eval(), images(), []
    expected = model(x)
    module = model.get_submodule(name)
    original = module.forward
    module.forward = lambda *args: seen.append((*args, original(*args))) or seen[-1][-1]
    assert oracles.relative_error(model(x), expected) < 1e-5
    assert [type(tensor) for tensors in seen for tensor in tensors] == [torch.Tensor] * 2


@torch.no_grad()
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('family', SMALL)
def test_linear_layers_can_be_quantised(family):
    model, x = small(family).eval(), images()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert oracles.relative_error(quantised(x), model(x)) < 0.2
