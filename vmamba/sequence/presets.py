"""Sizes of published models, and small ones for bytes.

Mamba: https://arxiv.org/abs/2312.00752, Mamba-2: https://arxiv.org/abs/2405.21060
MambaByte: Token-free Selective State Space Model, https://arxiv.org/abs/2401.13660
"""

from difflib import get_close_matches
from typing import Any, Dict

from .model import LanguageModel

Options = Dict[str, Any]


def _mamba(d_model: int, n_layer: int) -> Options:
    return dict(d_model=d_model, n_layer=n_layer)


def _mamba2(d_model: int, n_layer: int) -> Options:
    return dict(d_model=d_model, n_layer=n_layer, ssm_cfg={'layer': 'Mamba2'}, pad_vocab_size_multiple=16)


def _byte(d_model: int, n_layer: int) -> Options:
    """Byte values are the vocabulary; as in its authors' repository, LayerNorm and a head of its own."""
    return dict(d_model=d_model, n_layer=n_layer, vocab_size=256, rms_norm=False, tie_embeddings=False)


PRESETS: Dict[str, Options] = {
    'mamba_130m': _mamba(768, 24),
    'mamba_370m': _mamba(1024, 48),
    'mamba_790m': _mamba(1536, 48),
    'mamba_1.4b': _mamba(2048, 48),
    'mamba_2.8b': _mamba(2560, 64),
    'mamba2_130m': _mamba2(768, 24),
    'mamba2_370m': _mamba2(1024, 48),
    'mamba2_780m': _mamba2(1536, 48),
    'mamba2_1.3b': _mamba2(2048, 48),
    'mamba2_2.7b': _mamba2(2560, 64),
    'mambabyte_nano': _byte(64, 4),
    'mambabyte_tiny': _byte(256, 8),
    'mambabyte_small': _byte(512, 12),
    'mambabyte_353m': _byte(1024, 53),
    'mambabyte_972m': _byte(1792, 48),
    'mambabyte_1.6b': _byte(2304, 48),
}


def create_language_model(name: str, **options: Any) -> LanguageModel:
    """A new `LanguageModel` of a size in `PRESETS`, with random weights.

    Args:
        name: Key of `PRESETS`.
        **options: Of `LanguageModel`, in place of the preset's.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=3)
        hint = f'did you mean {" or ".join(near)}?' if near else f'there are {", ".join(PRESETS)}'
        raise ValueError(f'there is no language model {name!r}; {hint}')
    return LanguageModel(**{**PRESETS[name], **options})
