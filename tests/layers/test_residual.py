"""Where the branches of a block run on fused kernels, where their modules are called, and that both give the same."""

import functools
from contextlib import contextmanager

import chains
import oracles
import pytest
import torch
from block_cases import BRANCHES, SHAPES, branches_of, branches_without, make_block, make_input
from cases import DEVICE, needs_triton
from recorder import Recorder
from timm.layers import DropPath, GluMlp, Mlp
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from vmamba.kernels import branches, use_triton
from vmamba.layers import SS2D, BiMamba, LayerNorm, RmsNorm, residual_branches
from vmamba.layers.residual import runs_fused

pytestmark = [needs_triton, pytest.mark.slow]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def would_run(monkeypatch):
    return chains.pretend(monkeypatch)


@pytest.fixture(params=SHAPES)
def family(request):
    return request.param


@pytest.fixture
def block(family):
    return make_block(family)


@pytest.fixture
def x(family):
    return make_input(family)


@contextmanager
def modules_alone():
    """Nothing runs fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, 'can_run', lambda x: False)
        yield


def modules_of(block):
    return [(name, module) for name, module in block.named_modules() if module is not block]


def parameters_of(block):
    """(module, name, parameter)"""
    return [(m, name, p) for _, m in modules_of(block) for name, p in list(m.named_parameters(recurse=False))]


def assert_called(block, family, x, module, seen, would_run, message):
    """A module's call is seen, and only the branches that it is no part of run fused."""
    seen.clear()
    would_run.clear()
    block(x).sum().backward()
    assert seen, message
    assert would_run == [(FP32, name) for name in branches_without(block, family, module)], message


def test_branches_of_plain_modules_run_fused(block, family, x, would_run):
    block(x)
    block.eval()(x)
    block.register_forward_hook(lambda *args: None)  # of the block, around its branches
    block(x)
    assert would_run == [(FP32, *BRANCHES[family])] * 3


HOOKS = {
    'forward': 'register_forward_hook',
    'forward-pre': 'register_forward_pre_hook',
    'backward': 'register_full_backward_hook',
    'backward-pre': 'register_full_backward_pre_hook',
}


@pytest.mark.parametrize('hook', HOOKS)
def test_modules_with_hooks_are_called(block, family, x, would_run, hook):
    seen = []
    for name, module in modules_of(block):
        handle = getattr(module, HOOKS[hook])(lambda *args: seen.append(args[0]))
        assert_called(block, family, x, module, seen, would_run, name)
        handle.remove()
    would_run.clear()
    block(x)
    assert would_run == [(FP32, *BRANCHES[family])], 'hooks leave nothing behind'


@pytest.mark.parametrize('hook', HOOKS)
def test_hooks_of_all_modules_see_every_call(block, x, would_run, hook):
    seen = []
    register = getattr(torch_module, HOOKS[hook].replace('register_', 'register_module_'))
    handle = register(lambda module, *args: seen.append(module))
    try:
        block(x).sum().backward()
    finally:
        handle.remove()
    assert set(seen) == set(block.modules()) and not would_run


def test_a_forward_that_is_put_in_place_is_called(block, family, x, would_run):
    seen = []
    for name, module in modules_of(block):
        module.forward = lambda x, forward=module.forward: seen.append(x) or forward(x)
        assert_called(block, family, x, module, seen, would_run, name)
        del module.forward


def test_modules_compiled_by_themselves_are_called(family, x, would_run):
    block = make_block(family)
    for member in branches_of(block)[0][:2]:
        seen = []
        member.compile(backend=lambda graph, inputs, seen=seen: lambda *args: seen.append(1) or graph(*args))
        block(x)
        assert seen
        member._compiled_call_impl = None
    assert would_run == [(FP32, name) for name in BRANCHES[family][1:]] * 2


class Seen(nn.Module):
    """A parametrisation that changes nothing."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, weight):
        self.seen.append(1)
        return weight * 1


def test_parametrised_weights_are_computed(block, family, x, would_run):
    seen = []
    for module, name, _ in parameters_of(block):
        parametrize.register_parametrization(module, name, Seen(seen))
        assert_called(block, family, x, module, seen, would_run, name)
        parametrize.remove_parametrizations(module, name)


def test_pruned_weights_are_computed(block, family, x, would_run):
    for module, name, _ in parameters_of(block):
        prune.random_unstructured(module, name, 0.5)
        would_run.clear()
        block.zero_grad()
        block(x).square().sum().backward()
        assert would_run == [(FP32, other) for other in branches_without(block, family, module)], name
        mask, grad = getattr(module, f'{name}_mask'), getattr(module, f'{name}_orig').grad
        assert grad is not None and not grad[mask == 0].any(), name
        prune.remove(module, name)


class Adapter(nn.Module):
    """A linear layer with a low-rank change, as adapters wrap it; `weight` and `bias` are the layer's own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 1), nn.Linear(1, base.out_features)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OwnLinear(nn.Linear):
    """A linear layer of another class."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize('kind', [Adapter, OwnLinear])
def test_what_stands_in_a_linear_layers_place_is_called(block, family, x, would_run, kind):
    for name, linear in modules_of(block):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition('.')
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            other = (Adapter(linear) if kind is Adapter else OwnLinear(*sizes)).to(DEVICE)
            setattr(block.get_submodule(parent), child, other)
            would_run.clear()
            block(x).square().sum().backward()
            assert would_run == [(FP32, other_name) for other_name in branches_without(block, family, other)], name
            assert all(p.grad is not None for p in other.parameters()), name
            setattr(block.get_submodule(parent), child, linear)


@pytest.mark.parametrize('position', [0, 1, 2], ids=['norm', 'module', 'drop-path'])
def test_what_stands_in_the_place_of_a_member_of_a_branch_is_called(block, x, would_run, position):
    seen = []

    class Other(nn.Module):
        def forward(self, x):
            seen.append(1)
            return x

    branch = list(branches_of(block)[0])
    branch[position] = Other()
    residual_branches(x, tuple(branch))
    assert seen and not would_run


class Quantised(torch.Tensor):
    """A matrix as integers with a scale of each row."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.integers = (weight / self.scale).round().to(torch.int8)

    def wide(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map(lambda t: t.wide() if isinstance(t, cls) else t, (args, kwargs or {}))
        return function(*args, **kwargs)


@torch.no_grad()
def test_quantised_weights_are_computed_by_their_own_class(block, family, x, would_run):
    block.eval()
    for name, linear in modules_of(block):
        if isinstance(linear, nn.Linear) and 'x_proj' not in name:
            weight = linear.weight
            linear.weight = nn.Parameter(Quantised(weight.detach()), requires_grad=False)
            would_run.clear()
            quantised = block(x)
            assert would_run == [(FP32, other) for other in branches_without(block, family, linear)], name
            linear.weight = nn.Parameter(linear.weight.wide(), requires_grad=False)
            if len(BRANCHES[family]) == 1:
                with modules_alone():
                    assert oracles.relative_error(quantised, block(x)) < 1e-6, name
            linear.weight = weight


class Subclass(torch.Tensor):
    """As distributed tensors are."""


UNUSUAL = {
    'subclass': lambda weight: weight.as_subclass(Subclass),
    'strided': lambda weight: torch.stack([weight, weight], dim=-1)[..., 0],
    'elsewhere': lambda weight: weight.to('meta'),
}


@pytest.mark.parametrize('change', UNUSUAL.values(), ids=UNUSUAL)
def test_parameters_that_the_kernels_do_not_take(block, family, x, would_run, change):
    for module, name, parameter in parameters_of(block):
        module._parameters[name] = nn.Parameter(change(parameter.detach()))
        others = branches_without(block, family, module)
        for kind, branch in zip(BRANCHES[family], branches_of(block)):
            assert runs_fused(x, [branch]) == (kind in others), name
        module._parameters[name] = parameter
    assert runs_fused(x, branches_of(block))


def test_parameters_of_any_strides_give_the_same(family, x, would_run):
    block = make_block(family).eval()
    with modules_alone():
        expected = block(x)
    for module, name, parameter in parameters_of(block):
        module._parameters[name] = nn.Parameter(UNUSUAL['strided'](parameter.detach()))
    assert oracles.relative_error(block(x), expected) < 1e-6
    assert not would_run


OTHER_MLPS = {
    'tanh': dict(act_layer=functools.partial(nn.GELU, approximate='tanh')),
    'silu': dict(act_layer=nn.SiLU),
    'norm': dict(norm_layer=nn.LayerNorm),
    'no-bias': dict(bias=False),
    'convolutions': dict(use_conv=True),
    'dropout': dict(drop=0.5),
}


@pytest.mark.parametrize('mlp', [*OTHER_MLPS, 'gated', 'subclass'])
def test_other_mlps_are_called(mlp, would_run):
    options, kind = OTHER_MLPS.get(mlp, {}), {'gated': GluMlp, 'subclass': type('OwnMlp', (Mlp,), {})}.get(mlp, Mlp)
    norm, mlp = LayerNorm(8).to(DEVICE), kind(8, 16, **options).to(DEVICE)
    x = torch.randn(2, 3, 4, 8, device=DEVICE)
    assert not runs_fused(x, [(norm, mlp, nn.Identity())])
    assert runs_fused(x, [(norm, Mlp(8, 16).to(DEVICE), nn.Identity())])
    if options.get('drop'):
        assert runs_fused(x, [(norm, mlp.eval(), nn.Identity())]), 'in evaluation nothing drops out'


def traced(block, x):
    torch.jit.trace(block, x, check_trace=False)


def with_tangent(block, x):
    with torch.autograd.forward_ad.dual_level():
        block(x)


def under_a_mode(block, x):
    with Recorder():
        block(x)


def recomputed_by_choice(block, x):
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()


LOOKED_AT = {
    'traced': traced,
    'tangents': with_tangent,
    'dispatch-mode': under_a_mode,
    'selective-checkpoint': recomputed_by_choice,
    'functionalised': lambda block, x: torch.func.functionalize(block)(x),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('look', LOOKED_AT.values(), ids=LOOKED_AT)
def test_modules_are_called_where_their_operators_are_looked_at(family, x, would_run, look):
    look(make_block(family, drop_path=0.0).eval(), x.detach())
    assert not would_run


TRANSFORMS = {
    'grad': lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    'vjp': lambda f, x: torch.func.vjp(f, x),
    'vmap': lambda f, x: torch.func.vmap(f)(x[None]),
    'jvp': lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('transform', TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_never_meet_the_kernels(transform, block, x, would_run):
    """They meet the operators, which have messages of their own for what they cannot do."""
    seen = []
    transform(lambda x: seen.append(runs_fused(x, branches_of(block))) or x * 2, x.detach())
    assert seen == [False]


DTYPES = {
    # stream, weights, autocast -> the products' dtype, or None where modules are called
    'fp32': (FP32, FP32, None, FP32),
    'fp16-weights': (FP32, FP16, None, FP16),
    'bf16-weights': (FP32, BF16, None, BF16),
    'autocast': (FP32, FP32, BF16, BF16),
    'autocast-fp16-weights': (FP32, FP16, BF16, BF16),
    'fp16': (FP16, FP16, None, FP16),
    'bf16': (BF16, BF16, None, BF16),
    'autocast-stream': (BF16, FP32, BF16, BF16),
    'fp64': (torch.float64, torch.float64, None, None),
    'fp64-weights': (FP32, torch.float64, None, None),
}


@torch.no_grad()
@pytest.mark.parametrize('stream,weights,autocast,products', DTYPES.values(), ids=DTYPES)
def test_the_stream_keeps_its_dtype_and_the_products_have_that_of_the_weights_or_autocasts(
    block, family, x, would_run, stream, weights, autocast, products
):
    with torch.autocast(DEVICE, autocast or BF16, enabled=autocast is not None):
        y = block.to(weights)(x.to(stream))
    assert would_run == ([(products, *BRANCHES[family])] if products else [])
    assert y.dtype == torch.promote_types(stream, products or (FP32 if autocast else weights))


@torch.no_grad()
def test_modules_run_on_a_stream_whose_dtype_they_would_change(block, x):
    for products in (FP32, BF16):
        with torch.autocast(DEVICE, BF16, enabled=products == BF16):
            assert not runs_fused(x.half(), branches_of(block))


def test_branches_of_different_dtypes_run_one_by_one(would_run):
    block = make_block('vmamba')
    block.mlp.half()
    block(make_input('vmamba'))
    assert would_run == [(FP32, 'SS2DBranch'), (FP16, 'MlpBranch')]


def test_an_empty_map_is_left_to_the_modules(block, x, would_run):
    assert block(x[:0]).shape == x[:0].shape
    assert not would_run


@pytest.mark.parametrize('kind,options', [
    pytest.param(SS2D, dict(d_conv=7), id='window'),
    pytest.param(BiMamba, dict(d_conv=7), id='taps'),
    pytest.param(BiMamba, dict(d_state=2 * branches.MAX_STATES), id='states'),
])  # fmt: skip
def test_sizes_that_the_kernels_do_not_take_are_left_to_the_modules(kind, options, would_run):
    norm, shape = (LayerNorm(4), (1, 3, 3, 4)) if kind is SS2D else (RmsNorm(4), (1, 3, 4))
    residual_branches(
        torch.randn(shape, device=DEVICE), (norm.to(DEVICE), kind(4, **options).to(DEVICE), nn.Identity())
    )
    assert not would_run


def replica_of(module):
    """As DataParallel makes it for each device: without parameters, whose copies are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)
    return replica


def test_replicas_of_data_parallel_compute_the_same_and_train_the_original(block, x, would_run):
    block.eval()
    replica = replica_of(block)
    y = replica(x)
    assert not would_run
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    with modules_alone():
        assert oracles.relative_error(y, block(x)) < 1e-6


# Samples that are dropped.


@torch.no_grad()
def test_dropped_samples_pass_unchanged_and_the_others_are_scaled(family):
    block, x = make_block(family, drop_path=0.5), torch.randn(24, *SHAPES[family][1:], device=DEVICE)
    y, cases = block(x), set()
    for before, after in zip(x.split(1), y.split(1)):
        outcomes = [before]
        for norm, module, _ in branches_of(block):
            outcomes = [out for x in outcomes for out in (x, x + 2 * module(norm(x)))]
        errors = [oracles.relative_error(after, outcome) for outcome in outcomes]
        cases.add(errors.index(min(errors)))
        assert min(errors) < 1e-5
    assert cases == set(range(2 ** len(branches_of(block)))), 'each branch is dropped and kept'


@pytest.mark.parametrize('drop_path,kept', [
    pytest.param(DropPath(0.3), 1 / 0.7, id='scaled'),
    pytest.param(DropPath(0.3, scale_by_keep=False), 1.0, id='unscaled'),
])  # fmt: skip
def test_the_kernels_get_factors_of_samples(would_run, drop_path, kept):
    norm, mlp = LayerNorm(8).to(DEVICE), Mlp(8, 16).to(DEVICE)
    residual_branches(torch.randn(4000, 2, 8, device=DEVICE), (norm, mlp, drop_path))
    scale = would_run.links[0].scale
    assert (scale.shape, scale.dtype) == ((4000,), FP32)
    assert 0.27 < (scale == 0).float().mean() < 0.33
    torch.testing.assert_close(scale[scale != 0], torch.full_like(scale[scale != 0], kept))


@pytest.mark.parametrize('drop_path,expected', [
    pytest.param(DropPath(1.0), torch.zeros(5), id='all'),
    pytest.param(DropPath(0.3).eval(), None, id='evaluation'),
    pytest.param(DropPath(0.0), None, id='none'),
    pytest.param(nn.Identity(), None, id='no-drop-path'),
])  # fmt: skip
def test_the_kernels_get_no_factors_where_nothing_is_drawn(would_run, drop_path, expected):
    norm, mlp = LayerNorm(8).to(DEVICE), Mlp(8, 16).to(DEVICE)
    residual_branches(torch.randn(5, 2, 8, device=DEVICE), (norm, mlp, drop_path))
    scale = would_run.links[0].scale
    assert scale is None if expected is None else torch.equal(scale.cpu(), expected)


# On the kernels themselves.


def outputs_and_gradients(function, x, parameters):
    """The output and the gradients of x and the parameters that want one; drawn are always the same samples."""
    torch.manual_seed(1)
    y = function(x)
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.fixture
def ran(monkeypatch):
    """The chains that run, on Triton."""
    with use_triton(True):
        yield chains.record(monkeypatch)


def test_recomputed_and_offloaded_blocks_give_the_same(ran):
    block, x = make_block('vim'), make_input('vim')
    parameters = list(block.parameters())
    expected = outputs_and_gradients(block, x, parameters)
    assert len(ran) == 1
    for reentrant in (False, True):
        function = functools.partial(checkpoint.checkpoint, block, use_reentrant=reentrant)
        torch.manual_seed(1)
        y = function(x)
        y.square().sum().backward()
        grads = [x.grad, *(p.grad for p in parameters)]
        assert all(map(torch.equal, [y, *grads], expected)), reentrant
        for tensor in (x, *parameters):
            tensor.grad = None
    assert len(ran) == 5
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, outputs_and_gradients(block, x, parameters), expected))


def test_frozen_parameters_leave_the_other_gradients_as_they_are(ran):
    block, x = make_block('vim'), make_input('vim')
    parameters = list(block.parameters())
    expected = outputs_and_gradients(block, x, parameters)
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    y, grad_x, *grads = outputs_and_gradients(block, x, parameters)
    assert torch.equal(y, expected[0]) and torch.equal(grad_x, expected[1])
    assert all(map(torch.equal, grads, expected[3::2])) and len(grads) == len(expected[3::2])
    x = x.detach()
    assert all(map(torch.equal, outputs_and_gradients(block, x, parameters)[1:], expected[3::2]))


def test_parameters_given_to_a_functional_call_get_the_gradients(ran):
    block, x = make_block('vim'), make_input('vim')
    given = {name: (1.5 * parameter.detach()).requires_grad_() for name, parameter in block.named_parameters()}
    actual = outputs_and_gradients(lambda x: functional_call(block, given, (x,)), x, given.values())
    block.load_state_dict(given)
    expected = outputs_and_gradients(block, x, block.parameters())
    assert len(ran) == 2 and all(map(torch.equal, actual, expected))


def test_inference_gives_what_training_gives(family, ran):
    """Without a backward pass the kernels keep less."""
    block, x = make_block(family).eval(), make_input(family)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected)
    assert ran == [(FP32, *BRANCHES[family])] * 3


def test_second_derivatives_are_an_error(ran):
    block, x = make_block('vim'), make_input('vim')
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()
    assert len(ran) == 1


def test_a_map_of_other_strides_gives_the_same(ran):
    block, x = make_block('vim').eval(), make_input('vim')
    expected = outputs_and_gradients(block, x, block.parameters())
    strided = x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
    for actual, theirs in zip(outputs_and_gradients(block, strided, block.parameters()), expected):
        torch.testing.assert_close(actual, theirs)
    assert len(ran) == 2
