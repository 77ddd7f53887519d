"""What values the keys of a configuration take, as far as no model or data is needed to say so."""

import math
from typing import Any, Dict, NamedTuple, Tuple

from vmamba.tools.user_errors import UserError, nearest


class Range(NamedTuple):
    """Numbers of a key, or of each item of its list; None is no limit."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: object) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        words = {'at least': self.least, 'above': self.above, 'at most': self.most, 'below': self.below}
        given = [f'{word} {limit:g}' for word, limit in words.items() if math.isfinite(limit)]
        return ' and '.join(given)


CHOICES = {
    'precision': ('fp32', 'bf16', 'fp16'),
    'remode': ('const', 'rand', 'pixel'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'clip_mode': ('norm', 'value', 'agc'),
    'in_chans': (1, 3),
    'interpolation': ('random', 'bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos'),
    'log': ('tensorboard', 'wandb'),
    'sched': ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none'),
}
_RANGES: Dict[Range, Tuple[str, ...]] = {
    Range(least=1): (
        *('num_classes', 'img_size', 'batch_size', 'val_batch_size', 'synthetic_images', 'aug_repeats'),
        *('accumulate', 'epochs', 'log_every', 'keep_checkpoints'),
    ),
    Range(least=0): (
        *('workers', 'color_jitter', 'mixup', 'cutmix', 'weight_decay', 'warmup_epochs', 'warmup_lr', 'min_lr'),
        *('checkpoint_every', 'distill_weight'),
    ),
    Range(above=0): ('lr', 'lr_base', 'clip_grad', 'distill_temperature', 'ratio'),
    Range(least=0, most=1): ('hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob'),
    Range(least=0, below=1): ('drop_path', 'smoothing', 'ema_decay'),
    Range(above=0, below=1): ('val_fraction',),
    Range(above=0, most=1): ('layer_decay', 'crop_pct', 'scale'),
    Range(least=0, below=2**63): ('seed',),
}


def check_values(config: Any) -> None:
    """Raises UserError for the first value that no run could have a use for."""
    for key, choices in CHOICES.items():
        found = getattr(config, key)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and value not in choices:
                guess = nearest(value, choices) if isinstance(value, str) else ''
                raise UserError(f'{key} must be one of {", ".join(map(str, choices))}, got {value!r}{guess}')
    for limits, keys in _RANGES.items():
        for key in keys:
            _check_range(key, getattr(config, key), limits)
    for key in ('scale', 'ratio'):
        pair = getattr(config, key)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(f'{key} must be two numbers, the lower first, got {pair}')
    if config.warmup_epochs >= config.epochs:
        raise UserError(f'warmup_epochs {config.warmup_epochs:g} must be below epochs {config.epochs}: lower it, or 0')


def _check_range(key: str, value: Any, limits: Range) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not (math.isfinite(number) and number in limits):
            raise UserError(f'{key} must be {limits}, got {value}')
