"""Language models against their definition, their states, options and initialisation."""

import math

import oracles
import pytest
import torch
from cases import BACKENDS, DEVICE, needs_gpu
from models import KINDS, VOCAB, draw, make
from official_language_model import language_model

from vmamba.kernels import use_triton
from vmamba.sequence import LanguageModel, create_language_model, next_token_loss


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', ['mamba', 'mamba2', 'mlp'])
def test_logits_and_gradients_follow_the_definition(kind, backend):
    model, ids = make(kind), draw(2, 9)
    sizes = dict(headdim=4, d_state=6, ngroups=2) if kind == 'mamba2' else {}
    wide = {key: value.double().requires_grad_() for key, value in model.state_dict().items()}
    if model.config['tie_embeddings']:
        wide['lm_head.weight'] = wide['backbone.embedding.weight']
    model.to(DEVICE)
    with use_triton(backend):
        logits = model(ids.to(DEVICE)).cpu()
    expected = language_model(wide, ids, 2, **sizes)
    assert logits.shape == (2, 9, 56) and oracles.relative_error(logits, expected) < 1e-5
    grad = torch.randn_like(logits)
    with use_triton(backend):
        logits.backward(grad)
    expected.backward(grad.double())
    for name, parameter in model.named_parameters():
        assert oracles.relative_error(parameter.grad.cpu(), wide[name].grad) < 1e-4, name


@pytest.mark.parametrize('kind', KINDS)
def test_prompts_and_steps_equal_the_whole_sequence(kind):
    model, ids = make(kind).double(), draw(2, 9)
    cache = model.allocate_cache(2, max_seqlen=9)
    parts = [model(ids[:, :3], cache=cache), model(ids[:, 3:6], cache=cache)]
    parts += [model.step(token, cache).unsqueeze(1) for token in ids[:, 6:].unbind(1)]
    assert oracles.relative_error(torch.cat(parts, dim=1), model(ids)) < 1e-10
    last = model(ids, num_last_tokens=2)
    assert oracles.relative_error(last, model(ids)[:, -2:]) < 1e-12


def test_states_after_a_prompt_are_the_official_ones():
    """The convolution's last four inputs, filled with zeros on the left, and the state of the recurrence."""
    model, ids = make('mamba', n_layer=1).double(), draw(1, 3)
    cache = model.allocate_cache(1)
    model(ids, cache=cache)
    p = {key.removeprefix('backbone.layers.0.'): value for key, value in model.state_dict().items()}
    x = oracles.rms_norm(p['backbone.embedding.weight'][ids], p['norm.weight']) @ p['mixer.in_proj.weight'].T
    x, dim = x.chunk(2, dim=-1)[0], 32
    assert torch.equal(cache[0].conv[..., 0], torch.zeros(1, dim, dtype=torch.double))
    assert oracles.relative_error(cache[0].conv[..., 1:], x.mT) < 1e-12
    u = torch.nn.functional.conv1d(x.mT, p['mixer.conv1d.weight'], p['mixer.conv1d.bias'], padding=3, groups=dim)
    u = oracles.silu(u[..., :3]).mT
    dt, B, _ = (u @ p['mixer.x_proj.weight'].T).split([1, 5, 5], dim=-1)
    dt = oracles.softplus(dt @ p['mixer.dt_proj.weight'].T + p['mixer.dt_proj.bias'])
    state = torch.zeros(1, dim, 5, dtype=torch.double)
    for t in range(3):
        decay = torch.exp(-dt[:, t, :, None] * torch.exp(p['mixer.A_log']))
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
    assert oracles.relative_error(cache[0].ssm, state) < 1e-12


@pytest.mark.parametrize('kind', ['mamba', 'mamba2', 'attention'])
def test_packed_sequences_do_not_see_each_other(kind):
    model, ids = make(kind).double(), draw(1, 9)
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 4])
    expected = torch.cat([model(part) for part in ids.split([4, 1, 4], dim=1)], dim=1)
    assert oracles.relative_error(model(ids, seq_idx), expected) < 1e-10
    parts = ids.split([4, 1, 4], dim=1)
    losses = [model.loss(part) * (part.shape[1] - 1) for part in parts if part.shape[1] > 1]
    torch.testing.assert_close(model.loss(ids, seq_idx), sum(losses) / 6)


def test_the_loss_is_that_of_the_next_token():
    model, ids = make(), draw(2, 7)
    log_p = torch.log_softmax(model(ids).double(), dim=-1)
    expected = -torch.stack([log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(6)]).mean()
    torch.testing.assert_close(model.loss(ids).double(), expected)


def test_auxiliary_losses_of_experts_are_trained_on():
    model, ids = make('experts').train(), draw(2, 7)
    loss, logits = model.loss(ids), model(ids)
    plain = next_token_loss(logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, plain + model.backbone.layers[0].mlp.loss)
    assert loss > plain + 0.005


def test_official_names_sizes_and_initialisation():
    torch.manual_seed(0)
    model = LanguageModel(256, d_intermediate=300, n_layer=4, vocab_size=1001, pad_vocab_size_multiple=16)
    state = model.state_dict()
    assert model.lm_head.weight is model.backbone.embedding.weight and state['lm_head.weight'].shape == (1008, 256)
    layer = {key.removeprefix('backbone.layers.3.') for key in state if key.startswith('backbone.layers.3.')}
    assert layer == {
        *('norm.weight', 'norm2.weight', 'mlp.fc1.weight', 'mlp.fc2.weight', 'mixer.A_log', 'mixer.D'),
        *('mixer.in_proj.weight', 'mixer.conv1d.weight', 'mixer.conv1d.bias', 'mixer.x_proj.weight'),
        *('mixer.dt_proj.weight', 'mixer.dt_proj.bias', 'mixer.out_proj.weight'),
    }
    assert state['backbone.layers.0.mlp.fc1.weight'].shape == (2 * 384, 256)  # a multiple of 128
    assert abs(state['backbone.embedding.weight'].std() / 0.02 - 1) < 0.02
    for name, fan_in in (('mixer.out_proj', 512), ('mlp.fc2', 384)):
        weight = state[f'backbone.layers.1.{name}.weight']
        assert 0.98 < weight.abs().max() * math.sqrt(4 * fan_in) <= 1
    untied = LanguageModel(16, n_layer=1, vocab_size=5, tie_embeddings=False, ssm_cfg={'bias': True})
    assert untied.lm_head.weight.shape == (8, 16) and not untied.backbone.layers[0].mixer.in_proj.bias.any()
    assert untied.backbone.layers[0].mixer.dt_proj.bias.all()


SIZES = {'mamba-130m': (768, 24, {}, 8, 129_135_360), 'mamba2-130m': (768, 24, {'layer': 'Mamba2'}, 16, 128_989_632)}


@pytest.mark.parametrize('name', SIZES)
def test_published_numbers_of_parameters(name):
    d_model, n_layer, ssm_cfg, multiple, expected = SIZES[name]
    model = LanguageModel(d_model, n_layer=n_layer, ssm_cfg=ssm_cfg, pad_vocab_size_multiple=multiple, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(('name', 'total', 'active'), [('moe_mamba_25m', 542, 26), ('moe_mamba_100m', 2439, 117)])
def test_published_numbers_of_parameters_with_experts(name, total, active):
    """In millions, without embeddings."""
    model = create_language_model(name, device='meta')
    numbers = {key: parameter.numel() for key, parameter in model.backbone.layers.named_parameters()}
    assert abs(sum(numbers.values()) / 1e6 - total) < 1
    used = sum(number / (42 if '.fc' in key else 1) for key, number in numbers.items())
    assert abs(used / 1e6 - active) < 1.5


def test_what_is_not_decayed():
    names = make('s4d-h3').no_weight_decay() | make('mamba2').no_weight_decay()
    for name in ('0.mixer.kernel.log_dt', '1.mixer.kernel.kernel.A_imag', '0.mixer.dt_bias', '0.norm.weight'):
        assert f'backbone.layers.{name}' in names
    assert not any('proj.weight' in name or 'embedding' in name for name in names)


def test_half_precision_keeps_the_parameters_of_the_recurrence():
    model, ids = make('mamba'), draw(2, 9)
    expected = model(ids)
    kept = {name for name, p in model.cast(torch.bfloat16).named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition('mixer.')[2] for name in kept} == {'A_log', 'D', 'dt_proj.bias'}
    logits = model(ids)
    assert logits.dtype == torch.bfloat16 and oracles.relative_error(logits.float(), expected) < 0.05
    cache = model.allocate_cache(2)
    model(ids[:, :-1], cache=cache)
    step = model.step(ids[:, -1], cache)
    assert oracles.relative_error(step.float(), expected[:, -1]) < 0.05


def test_the_residual_may_have_the_dtype_of_activations():
    ids, dtypes = draw(2, 5), []
    for in_fp32 in (True, False):
        model = make(residual_in_fp32=in_fp32).cast(torch.bfloat16)
        model.backbone.layers[1].register_forward_hook(lambda *args: dtypes.append(args[2][1].dtype))  # noqa: B023
        assert model(ids).isfinite().all()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_recomputed_activations_give_the_same_gradients():
    model, ids = make('mlp').double(), draw(2, 5)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model.loss(ids), list(model.parameters())))
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)


def test_ids_out_of_range():
    model = make()
    with pytest.raises(ValueError, match='ids must be from 0 to 52, the vocabulary; got 54'):
        model(torch.tensor([[1, 54]]))  # of the padding
    with pytest.raises(ValueError, match='got -1'):
        model.step(torch.tensor([-1]), model.allocate_cache(1))
    with pytest.raises(ValueError, match=r'ids must be integers \[B, L\] with at least one token, got \(3,\)'):
        model(draw(3))


@pytest.mark.parametrize('kind', KINDS)
def test_too_few_tokens(kind):
    model = make(kind)
    with pytest.raises(ValueError, match=r'with at least one token, got \(2, 0\)'):
        model(draw(2, 0))
    with pytest.raises(ValueError, match=r'a loss needs at least two tokens \[B, L\], got \(2, 1\)'):
        model.loss(draw(2, 1))


def test_mixers_that_cannot_tell_packed_sequences_apart():
    ids = draw(1, 4)
    with pytest.raises(ValueError, match='seq_idx is for Mamba, Mamba2 and Attention, but the model has H3, S4D'):
        make('s4d-h3')(ids, seq_idx=torch.zeros_like(ids))


def test_a_step_of_training_drops_no_token():
    """A batch may be smaller than the number of experts."""
    model = make('experts')
    ids, stepped = draw(2, 5), []
    expected = model(ids)
    model.train()
    cache = model.allocate_cache(2)
    for token in ids.unbind(1):
        stepped.append(model.step(token, cache))
    torch.testing.assert_close(torch.stack(stepped, dim=1), expected)


@pytest.mark.gpu
@needs_gpu
def test_ids_out_of_range_on_a_gpu_leave_no_number():
    model = make().cuda()
    logits = model(torch.tensor([[1, 54, 2], [1, 2, 3]], device='cuda'))
    assert logits[0, 0].isfinite().all() and logits[0, 1:].isnan().all() and logits[1].isfinite().all()


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(n_layers=2), TypeError, 'n_layers'),
        (dict(ssm_cfg={'layer': 'Mamba3'}), ValueError, "layer must be one of .*'mamba2'.*, got 'Mamba3'"),
        (dict(ssm_cfg={'dstate': 3}), TypeError, 'dstate'),
        (dict(attn_layer_idx=[2]), ValueError, 'attn_layer_idx must be below the 2 layers, got 2'),
        (dict(layers=['mamba'] * 3), ValueError, 'n_layer must be the number of layers, at least 1: got 2 for 3'),
        (dict(layers=[['mamba', 'mpl']] * 2), ValueError, "feed_forward must be one of 'mlp', .*'none', got 'mpl'"),
        (dict(layer_cfg={'h3': {}}), ValueError, "layer_cfg has arguments of 'h3'"),
        (dict(layers=['mamba', 's4d'], layer_cfg={'s4d': {'bidirectional': True}}), ValueError, 'later tokens'),
        (dict(attn_layer_idx=[0], attn_cfg={'num_heads': 2, 'causal': False}), ValueError, 'later tokens'),
        (dict(attn_layer_idx=[0]), ValueError, 'attention needs num_heads: give it in attn_cfg'),
        (dict(layers=[['mamba', 'mlp']] * 2), ValueError, 'mlp needs d_hidden: give it in layer_cfg'),
        (dict(layers=[['mamba', 'moe']] * 2), ValueError, 'moe needs num_experts: give it in layer_cfg'),
        (dict(vocab_size=0), ValueError, 'vocab_size must be an integer of at least 1, got 0'),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        LanguageModel(**{**dict(d_model=8, n_layer=2, vocab_size=VOCAB), **options})
