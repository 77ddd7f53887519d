"""Accuracies that the models' authors publish, of ImageNet-1K's validation images. Not measured here."""

from typing import Dict, NamedTuple, Optional

import timm


class Published(NamedTuple):
    """Top-1 and top-5 accuracy in % at an image size; top-5 is None where only top-1 is published."""

    top1: float
    top5: Optional[float] = None
    size: int = 224


# By name, for the default weights, or by name and tag.
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
    'mambavision_t': Published(82.3, 96.2),
    'mambavision_t2': Published(82.7, 96.3),
    'mambavision_s': Published(83.3, 96.5),
    'mambavision_b': Published(84.2, 96.9),
    'mambavision_b.in21k_ft_in1k': Published(84.9, 97.5),
    'mambavision_l': Published(85.0, 97.1),
    'mambavision_l.in21k_ft_in1k': Published(86.1, 97.9),
    'mambavision_l2': Published(85.3, 97.2),
    'mambavision_l2.in21k_ft_in1k_512': Published(87.3, 98.4, 512),
    'mambavision_l3': Published(87.3, 98.3, 256),
    'mambavision_l3.in21k_ft_in1k_512': Published(88.1, 98.6, 512),
    'vssd_micro': Published(82.5),
    'vssd_t': Published(83.6),
    'vssd_t.mesa_in1k': Published(84.1),
    'vssd_s': Published(84.1),
    'vssd_s.mesa_in1k': Published(84.5),
    'vssd_b': Published(84.7),
    'vssd_b.mesa_in1k': Published(85.4),
    'adventurer_t': Published(78.2),
    'adventurer_s': Published(81.8),
    'adventurer_b': Published(82.6),
    'adventurer_b.in1k_384': Published(84.2, None, 384),
    'adventurer_b.in1k_448': Published(84.3, None, 448),
    'adventurer_l': Published(83.4),
    'adventurer_b_patch8': Published(83.9),
    'adventurer_b_patch8.in1k_448': Published(84.8, None, 448),
}


def published(model: str, size: int, classes: int) -> Optional[Published]:
    """What is published for a model as it is tested: at its image size, with ImageNet-1K's 1000 classes.

    Args:
        model: Name, with or without the tag of its weights.
        size: Side of the images.
        classes: Of the model.
    """
    name, _, tag = model.partition('.')
    figures = PUBLISHED.get(model)
    if figures is None and name in PUBLISHED and tag == timm.get_pretrained_cfg(name).tag:
        figures = PUBLISHED[name]
    return figures if figures and size == figures.size and classes == 1000 else None
