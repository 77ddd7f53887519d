"""Accuracies that the models' authors publish, of ImageNet-1K's validation images. Not measured here."""

from typing import NamedTuple, Optional

import timm

from vmamba.configs import FOLDER
from vmamba.tools.training.config import read_yaml


class Published(NamedTuple):
    """Top-1 and top-5 accuracy in % at an image size; top-5 is None where only top-1 is published."""

    top1: float
    top5: Optional[float] = None
    size: int = 224


PUBLISHED = {
    name: Published(**figures) for name, figures in read_yaml(FOLDER / 'classification' / 'published.yml').items()
}


def published(model: str, size: int, classes: int) -> Optional[Published]:
    """What is published for a model as it is tested: at its image size, with ImageNet-1K's 1000 classes."""
    name, _, tag = model.partition('.')
    figures = PUBLISHED.get(model)
    if figures is None and name in PUBLISHED and tag == timm.get_pretrained_cfg(name).tag:
        figures = PUBLISHED[name]
    return figures if figures and size == figures.size and classes == 1000 else None
