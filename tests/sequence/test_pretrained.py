"""Checkpoints of language models: ours, official ones, and those of transformers as the reference."""

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys

import oracles
import pytest
import torch
from models import KINDS, VOCAB, draw, make
from packaging.version import Version
from safetensors.torch import load_file, save_file

from vmamba.sequence import LanguageModel


@pytest.mark.parametrize('kind', KINDS)
def test_a_saved_model_is_the_same(kind, tmp_path):
    model, ids = make(kind), draw(2, 7)
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert oracles.relative_error(loaded(ids), model(ids)) < 1e-6
    tied = loaded.lm_head.weight is loaded.backbone.embedding.weight
    assert tied == model.config['tie_embeddings'] and 'lm_head.weight' in load_file(tmp_path / 'model.safetensors')


def official(folder, model, config, names=('pytorch_model.bin',)):
    """Writes a model as mamba_ssm does; with several names, its weights in parts."""
    (folder / 'config.json').write_text(json.dumps(config))
    state = list(model.state_dict().items())
    for i, name in enumerate(names):
        torch.save(dict(state[i :: len(names)]), folder / name)
    if len(names) > 1:
        index = {key: names[i % len(names)] for i, (key, _) in enumerate(state)}
        (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': index}))


@pytest.mark.parametrize('names', [['pytorch_model.bin'], ['a.bin', 'b.bin']], ids=['one-file', 'parts'])
def test_official_files(names, tmp_path):
    """Keys that are missing or null have the official defaults."""
    model, ids = make(ssm_cfg={}), draw(2, 7)
    config = dict(d_model=16, n_layer=2, vocab_size=VOCAB, ssm_cfg={}, rms_norm=True, attn_layer_idx=None)
    official(tmp_path, model, config, names)
    loaded = LanguageModel.from_pretrained(str(tmp_path))
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.config['pad_vocab_size_multiple'] == 8 and loaded.config['tie_embeddings']
    assert LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


def test_official_defaults():
    model = LanguageModel(device='meta')
    assert model.config == dict(
        *(dict(d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg={}, attn_layer_idx=[]),),
        **dict(attn_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8),
        tie_embeddings=True,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_768_345_600


def broken(folder, **changes):
    model = make()
    official(folder, model, {**model.config, **changes})


def test_configurations_that_do_not_fit(tmp_path):
    cases = [
        (dict(n_layr=2), ValueError, "unknown key 'n_layr'; did you mean n_layer"),
        (dict(n_layer=3), RuntimeError, 'missing: backbone.layers.2.norm.weight'),
        (
            dict(d_model=32),
            RuntimeError,
            r'of another shape: backbone.embedding.weight \(56, 16\) instead of \(56, 32\)',
        ),
        (dict(rms_norm=False), RuntimeError, 'missing: backbone.layers.0.norm.bias'),
        (dict(model_type='gpt2'), ValueError, "model_type must be 'mamba' or 'mamba2', got 'gpt2'"),
    ]
    for changes, error, message in cases:
        broken(tmp_path, **changes)
        with pytest.raises(error, match=message):
            LanguageModel.from_pretrained(tmp_path)
    model = make(tie_embeddings=False)
    official(tmp_path, model, {**model.config, 'tie_embeddings': True})
    with pytest.raises(RuntimeError, match='set "tie_embeddings": false'):
        LanguageModel.from_pretrained(tmp_path)


def test_files_that_are_missing_or_unsafe(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no config.json'):
        LanguageModel.from_pretrained(tmp_path)
    broken(tmp_path)
    (tmp_path / 'pytorch_model.bin').unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors or pytorch_model.bin'):
        LanguageModel.from_pretrained(tmp_path)
    torch.save({'weight': print}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(RuntimeError, match='not loaded'):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is not valid JSON'):
        LanguageModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='neither a folder nor the id of a model'):
        LanguageModel.from_pretrained(tmp_path / 'absent')


CONFIGS = {
    'mamba': dict(hidden_size=16, state_size=5, use_bias=True, time_step_rank=3, layer_norm_epsilon=1e-4),
    'mamba2': dict(hidden_size=16, state_size=5, num_heads=8, head_dim=4, n_groups=2, time_step_limit=[0.01, math.inf]),
}


THEIRS = """
import json, sys, torch, transformers
kind, options, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
config = transformers.AutoConfig.for_model(kind, num_hidden_layers=2, **options)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
for parameter in model.parameters():
    parameter.data.add_(0.1 * torch.randn_like(parameter))
model.save_pretrained(folder)
ids = torch.randint(options['vocab_size'], (2, 9))
options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1)
greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
torch.save(dict(ids=ids, logits=model(ids).logits.detach(), greedy=greedy), f'{folder}/results.pt')
"""


@pytest.mark.parametrize('kind', CONFIGS)
def test_models_of_transformers(kind, tmp_path):
    """Logits and greedy continuations equal theirs, computed in a process of its own."""
    if importlib.util.find_spec('transformers') is None:
        pytest.skip('needs the package transformers')
    if kind == 'mamba2' and Version(importlib.metadata.version('transformers')) < Version('5.23'):
        pytest.skip('earlier versions normalise all groups together, unlike the official model')
    options = json.dumps({**CONFIGS[kind], 'vocab_size': VOCAB})
    subprocess.run([sys.executable, '-c', THEIRS, kind, options, tmp_path], check=True)
    theirs, model = torch.load(tmp_path / 'results.pt'), LanguageModel.from_pretrained(tmp_path)
    assert oracles.relative_error(model(theirs['ids']), theirs['logits']) < 1e-5
    assert torch.equal(model.generate(theirs['ids'], 8, top_k=1), theirs['greedy'])


@pytest.mark.parametrize('kind', CONFIGS)
def test_configurations_of_transformers(kind, tmp_path):
    """By their names and defaults; bookkeeping is ignored."""
    options = {**CONFIGS[kind], 'vocab_size': 56, 'num_hidden_layers': 2}
    options.pop('layer_norm_epsilon', None)
    bookkeeping = dict(
        model_type=kind, architectures=['X'], transformers_version='4.40', use_cache=True, eos_token_id=0
    )
    ssm_cfg = dict(d_state=5, bias=True, dt_rank=3)
    if kind == 'mamba2':
        ssm_cfg = dict(layer='Mamba2', d_state=5, headdim=4, ngroups=2, dt_limit=(0.01, math.inf))
    model, ids = make('mamba', ssm_cfg=ssm_cfg, tie_embeddings=kind == 'mamba'), draw(2, 5)
    state = {key.replace('embedding.', 'embeddings.'): value for key, value in model.state_dict().items()}
    if kind == 'mamba':
        del state['lm_head.weight']
    save_file(state, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps({**options, **bookkeeping}))
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids), model(ids))
    (tmp_path / 'config.json').write_text(json.dumps({**options, **bookkeeping, 'hidden_act': 'gelu'}))
    with pytest.raises(ValueError, match="hidden_act must be 'silu', got 'gelu'"):
        LanguageModel.from_pretrained(tmp_path)
