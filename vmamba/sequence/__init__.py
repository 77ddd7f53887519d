"""Language and byte models on the mixers of `vmamba.layers`, and generation."""

from .data import ByteFiles, ByteWindows, bits_per_byte
from .generation import Sampling, generate, prefill, sample
from .model import FEED_FORWARDS, MIXERS, LanguageModel, next_token_loss
from .presets import PRESETS, create_language_model
from .speculative import speculative_generate

__all__ = [
    'FEED_FORWARDS',
    'MIXERS',
    'PRESETS',
    'ByteFiles',
    'ByteWindows',
    'LanguageModel',
    'Sampling',
    'bits_per_byte',
    'create_language_model',
    'generate',
    'next_token_loss',
    'prefill',
    'sample',
    'speculative_generate',
]
