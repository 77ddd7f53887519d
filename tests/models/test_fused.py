"""Whole models whose blocks run on the fused kernels; without a GPU, in Triton's interpreter (see conftest.py)."""

import chains
import oracles
import pytest
import timm
import torch
from cases import DEVICE, needs_triton
from recorder import Recorder

import vmamba  # noqa: F401  registers the models
from vmamba.kernels import use_triton

pytestmark = [needs_triton, pytest.mark.slow]
VMAMBA, VIM = ('SS2DBranch', 'MlpBranch'), ('BiMambaBranch',)
SMALL = {
    # variant, options, images, branches of a block, blocks
    'vmamba': ('vmamba_nano', dict(depths=(1, 1), embed_dim=8, ssm_ratio=1.0), (3, 3, 12, 20), VMAMBA, 2),
    'v0': ('vmamba_t_v0', dict(depths=(2,), embed_dim=4, d_state=2), (3, 3, 12, 12), VMAMBA[:1], 2),
    'vim': ('vim_nano', dict(depth=2, embed_dim=16, img_size=16, d_state=2), (3, 3, 16, 16), VIM, 2),
}
# Experts run as modules between the fused branches.
MOE = {
    'moe': (
        'vmamba_nano_moe',
        dict(depths=(1, 1), embed_dim=8, ssm_ratio=1.0, num_experts=2),
        (3, 3, 12, 20),
        VMAMBA[:1],
        2,
    ),
    'vim-moe': ('vim_nano_moe', dict(SMALL['vim'][1], num_experts=2), (3, 3, 16, 16), VIM, 2),
}
# Wide enough for the kernel of the MLP that holds the hidden map on the chip.
WIDE = 'vmamba_nano', dict(depths=(1,), embed_dim=32, ssm_ratio=1.0), (2, 3, 8, 12), VMAMBA, 1


def make(case, **options):
    name, own, shape, *_ = case
    model = timm.create_model(name, num_classes=5, **{**own, 'drop_path_rate': 0.4, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE).train(), torch.randn(shape, device=DEVICE, requires_grad=True)


def outputs_and_gradients(model, x, triton_kernels, autocast=None):
    """The same samples are dropped every time; the loss is scaled, so that no gradient vanishes in fp16."""
    torch.manual_seed(1)
    names, parameters = zip(*model.named_parameters())
    with use_triton(triton_kernels):
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            logits = model(x)
        weights = 1024 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
        gradients = torch.autograd.grad((logits * weights).sum(), [x, *parameters])
    return dict(zip(['logits', 'images', *names], [logits, *gradients], strict=True))


@pytest.mark.parametrize('case', [*SMALL.values(), *MOE.values()], ids=[*SMALL, *MOE])
def test_outputs_and_gradients_equal_those_of_the_modules(case, monkeypatch):
    model, x = make(case)
    ran = chains.record(monkeypatch)
    expected = outputs_and_gradients(model, x, False)
    assert not ran
    actual = outputs_and_gradients(model, x, True)
    assert ran == [(torch.float32, *case[3])] * case[4]
    for name, value in actual.items():
        assert oracles.relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize('case', [*SMALL.values(), WIDE], ids=[*SMALL, 'wide'])
def test_under_autocast_they_are_as_close_to_full_precision_as_those_of_the_modules(case, monkeypatch):
    """In fp16, which the interpreter computes as a GPU does."""
    model, x = make(case)
    exact = outputs_and_gradients(model, x, False)
    modules = outputs_and_gradients(model, x, False, torch.float16)
    ran = chains.record(monkeypatch)
    fused = outputs_and_gradients(model, x, True, torch.float16)
    assert ran == [(torch.float16, *case[3])] * case[4]
    for name, value in fused.items():
        assert value.dtype == modules[name].dtype, name
        bound = max(2 * oracles.relative_error(modules[name], exact[name]), 2e-3)
        assert oracles.relative_error(value, exact[name]) < bound, name


def test_weights_of_half_precision_give_what_the_modules_give(monkeypatch):
    model, x = make(SMALL['vim'], drop_path_rate=0.0)
    exact = outputs_and_gradients(model, x, False)
    x = x.detach().half().requires_grad_()
    ran = chains.record(monkeypatch)
    fused = outputs_and_gradients(model.half(), x, True)
    assert ran == [(torch.float16, 'BiMambaBranch')] * 2
    for name, value in fused.items():
        assert value.dtype == torch.float16
        assert oracles.relative_error(value, exact[name]) < 5e-3, name


@torch.no_grad()
@pytest.mark.parametrize('case,norms', [
    pytest.param(SMALL['vim'], 2 + 1, id='vim'),
    pytest.param(SMALL['vmamba'], 2 + 2 * 2 + 1 + 1, id='vmamba'),
])  # fmt: skip
def test_under_a_mode_every_operator_is_seen(case, norms, monkeypatch):
    """The modules run, and each norm is a kernel of its own, except the one within SS2D's core."""
    model, x = make(case, drop_path_rate=0.0)
    ran = chains.record(monkeypatch)
    with use_triton(False):
        expected = model(x)
    with use_triton(True), Recorder() as recorder:
        logits = model(x)
    assert not ran
    assert recorder.names.count('norm') == norms
    core = 'bimamba_core' if case is SMALL['vim'] else 'ss2d_core'
    assert recorder.names.count(core) == case[4]
    assert oracles.relative_error(logits, expected) < 1e-5
