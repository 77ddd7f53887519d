"""Accuracies that the models' authors publish, of ImageNet-1K's validation images at 224 pixels. Not measured here."""

from typing import Dict, NamedTuple, Optional


class Published(NamedTuple):
    """Top-1 and top-5 accuracy in %; top-5 is None where only top-1 is published."""

    top1: float
    top5: Optional[float] = None


SIZE = 224
PUBLISHED: Dict[str, Published] = {
    'vmamba_t': Published(82.6),
    'vmamba_s': Published(83.64898, 96.59420),
    'vmamba_b': Published(83.87897, 96.71220),
    'vmamba_t_s2l5': Published(82.48905, 95.99624),
    'vmamba_s_s1l20': Published(83.33900, 96.42621),
    'vmamba_b_s1l20': Published(83.79097, 96.61420),
    'vmamba_t_v0': Published(82.17107, 96.03224),
    'vmamba_s_v0': Published(83.46099, 96.47021),
    'vmamba_b_v0': Published(83.72898, 96.62420),
    'vim_t': Published(76.1, 93.0),
    'vim_t_stride8': Published(78.3, 94.2),
    'vim_s': Published(80.5, 95.1),
    'vim_s_stride8': Published(81.6, 95.4),
    'vim_b': Published(81.9, 95.8),
}


def published(model: str, size: int, classes: int) -> Optional[Published]:
    """What is published for a model as it is tested: at 224 pixels, with ImageNet-1K's 1000 classes."""
    return PUBLISHED.get(model.split('.')[0]) if size == SIZE and classes == 1000 else None
