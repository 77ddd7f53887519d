"""Language and byte models on the mixers of `vmamba.layers`, and generation."""

from .generation import Sampling, generate, prefill, sample
from .model import FEED_FORWARDS, MIXERS, LanguageModel, next_token_loss

__all__ = [
    'FEED_FORWARDS',
    'MIXERS',
    'LanguageModel',
    'Sampling',
    'generate',
    'next_token_loss',
    'prefill',
    'sample',
]
