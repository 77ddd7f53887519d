"""Configurations and weights of language models: mamba_ssm's, transformers' and our own."""

import json
import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple, Union

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models._pretrained import check_fit, read_checkpoint

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors', 'pytorch_model.bin'  # the first that is there; or its index, with the names of several
EMBEDDING, HEAD = 'backbone.embedding.weight', 'lm_head.weight'
# Keys of a configuration; mamba_ssm's are the first twelve.
KEYS = (
    *('d_model', 'd_intermediate', 'n_layer', 'vocab_size', 'ssm_cfg', 'attn_layer_idx', 'attn_cfg', 'rms_norm'),
    *('residual_in_fp32', 'fused_add_norm', 'pad_vocab_size_multiple', 'tie_embeddings'),
    *('layers', 'layer_cfg', 'norm_epsilon'),
)

Config = Dict[str, Any]


def read_pretrained(source: Union[str, Path]) -> Tuple[Config, Dict[str, Tensor]]:
    """Options of `LanguageModel`, and weights with its names, in at least fp32.

    Raises:
        FileNotFoundError: If a file is missing.
        RuntimeError: If a file is corrupt, or holds other objects than weights.
        ValueError: If the configuration has an unknown key or value.
    """
    path = _find(source, CONFIG)
    if path is None:
        raise FileNotFoundError(f'there is no {CONFIG} in {source}')
    try:
        config = json.loads(path.read_text('utf-8'), object_hook=_decode)
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} must hold keys and values, found a {type(config).__name__}')
    config = options_of(config)
    state_dict: Dict[str, Tensor] = {}
    for file in _weight_files(source):
        for key, value in read_checkpoint(file).items():
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            state_dict[key.replace('backbone.embeddings.', 'backbone.embedding.')] = wide
    return config, state_dict


def _decode(value: Dict[str, Any]) -> Any:
    """A JSON object; transformers writes infinity as {'__float__': 'Infinity'}."""
    return float(value['__float__']) if value.keys() == {'__float__'} else value


def options_of(config: Config) -> Config:
    """Options of `LanguageModel` from a configuration of mamba_ssm, of transformers (by model_type), or our own.

    A key of null takes its default, as one that is missing.

    Raises:
        ValueError: If a key is unknown, or transformers' model is one that `LanguageModel` does not have.
    """
    config = {key: value for key, value in config.items() if value is not None}
    if 'model_type' in config:
        return _from_transformers(config)
    for key in config:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            raise ValueError(
                f'the configuration has an unknown key {key!r}' + (f'; did you mean {near[0]}?' if near else '')
            )
    return config


def _from_transformers(config: Config) -> Config:
    """Of transformers' `MambaConfig` or `Mamba2Config`; keys that do not describe the network are ignored."""
    kind = config['model_type']
    if kind not in ('mamba', 'mamba2'):
        raise ValueError(f"model_type must be 'mamba' or 'mamba2', got {kind!r}")
    if config.get('hidden_act', 'silu') not in ('silu', 'swish'):
        raise ValueError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")

    def get(key: str, mamba: Any, mamba2: Any = None) -> Any:
        """A value, or transformers' default."""
        return config.get(key, mamba if kind == 'mamba' or mamba2 is None else mamba2)

    d_model, expand = get('hidden_size', 768, 4096), get('expand', 2)
    epsilon = get('layer_norm_epsilon', 1e-5)
    ssm_cfg = dict(
        d_state=get('state_size', 16, 128),
        d_conv=get('conv_kernel', 4),
        expand=expand,
        bias=get('use_bias', False),
        conv_bias=get('use_conv_bias', True),
        dt_min=get('time_step_min', 0.001),
        dt_max=get('time_step_max', 0.1),
        dt_init_floor=get('time_step_floor', 1e-4),
    )
    if kind == 'mamba':
        ssm_cfg.update(
            dt_rank=get('time_step_rank', 'auto'),
            dt_scale=get('time_step_scale', 1.0),
            dt_init=get('time_step_init_scheme', 'random'),
        )
    else:
        heads, headdim = get('num_heads', 128), get('head_dim', 64)
        if heads * headdim != int(expand * d_model):
            raise ValueError(
                f'num_heads * head_dim must be the {int(expand * d_model)} inner channels, got {heads} * {headdim}'
            )
        if epsilon != 1e-5:
            raise ValueError(f'layer_norm_epsilon of mamba2 must be 1e-05, got {epsilon}')
        low, high = get('time_step_limit', (0.0, math.inf))
        ssm_cfg.update(layer='Mamba2', headdim=headdim, ngroups=get('n_groups', 8), dt_limit=(low, high))
    return dict(
        d_model=d_model,
        n_layer=get('num_hidden_layers', 32, 64),
        vocab_size=get('vocab_size', 50280, 32768),
        ssm_cfg=ssm_cfg,
        residual_in_fp32=get('residual_in_fp32', True),
        pad_vocab_size_multiple=1,  # the size is that of the padded vocabulary
        tie_embeddings=config.get('tie_word_embeddings', kind == 'mamba'),
        norm_epsilon=epsilon,
    )


def fit_weights(state_dict: Dict[str, Tensor], model: nn.Module, source: Any) -> Dict[str, Tensor]:
    """Weights for all names of a `LanguageModel`; a tied head may be absent.

    Raises:
        RuntimeError: If names or shapes differ, or a tied head is not the embedding.
    """
    if model.config['tie_embeddings'] and EMBEDDING in state_dict:
        head = state_dict.setdefault(HEAD, state_dict[EMBEDDING])
        if head.shape == state_dict[EMBEDDING].shape and not torch.equal(head, state_dict[EMBEDDING]):
            raise RuntimeError(
                f'{source} has another {HEAD} than {EMBEDDING}, but its configuration ties them: set '
                f'"tie_embeddings": false in its {CONFIG}'
            )
    check_fit(state_dict, model, source, advice=f'Check its {CONFIG}')
    return state_dict


def write_pretrained(folder: Path, config: Config, state_dict: Dict[str, Tensor]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    # Copies, because tied weights are one tensor, which the format does not take twice.
    save_file({key: value.detach().cpu().clone() for key, value in state_dict.items()}, folder / WEIGHTS[0])


def _weight_files(source: Union[str, Path]) -> List[Path]:
    for name in WEIGHTS:
        path = _find(source, name)
        if path is not None:
            return [path]
        index = _find(source, f'{name}.index.json')
        if index is not None:
            return [_required(source, file) for file in sorted(_files_of(index))]
    raise FileNotFoundError(f'there is no {" or ".join(WEIGHTS)} in {source}')


def _files_of(index: Path) -> Set[str]:
    return set(json.loads(index.read_text('utf-8'))['weight_map'].values())


def _required(source: Union[str, Path], name: str) -> Path:
    path = _find(source, name)
    if path is None:
        raise FileNotFoundError(f'there is no {name} in {source}, which its index names')
    return path


def _find(source: Union[str, Path], name: str) -> Any:
    """The path of a file in a folder, or of a model of the Hugging Face Hub, downloaded; None if there is none."""
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(source)):
        raise FileNotFoundError(f'{source} is neither a folder nor the id of a model on the Hugging Face Hub')
    try:
        return Path(huggingface_hub.hf_hub_download(str(source), name))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f'cannot download {source} from the Hugging Face Hub: {error}') from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f'{source} is no folder, and the Hugging Face Hub says: {error}') from error
