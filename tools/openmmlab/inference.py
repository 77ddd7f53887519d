"""Prediction: mmdet's and mmseg's inferencers, and the images of files and videos."""

import warnings
from pathlib import Path
from typing import Iterator, Tuple

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS

from vmamba.tools.user_errors import UserError

from .checkpoints import load_weights, read_checkpoint
from .checks import check_classes, check_maps
from .runs import building

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


def frame_count(path: Path) -> int:
    """Number of images in a file, as a video states it."""
    if path.suffix.lower() not in VIDEOS:
        return 1
    return max(int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)), 1)


def frames_of(name: str, path: Path) -> Iterator[Tuple[str, np.ndarray]]:
    """The image of a file, or the frames of a video, [H, W, 3] in BGR, and the name of each.

    Raises:
        UserError: If it cannot be read.
    """
    if path.suffix.lower() not in VIDEOS:
        image = mmcv.imread(str(path))
        if image is None:
            raise UserError(f'{path} is no image that can be read')
        yield name, image
        return
    video = cv2.VideoCapture(str(path))
    number, (read, image) = 0, video.read()
    if not read:
        raise UserError(f'{path} is no video that OpenCV can read')
    while read:
        yield f'{name}_{number:06d}', image
        number, (read, image) = number + 1, video.read()


def build_inferencer(cfg: Config, checkpoint: Path, device: torch.device) -> BaseInferencer:
    """mmdet's or mmseg's inferencer with the model of a config and all weights of a checkpoint."""
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import DetInferencer as Inferencer
    else:
        from mmseg.apis import MMSegInferencer as Inferencer
    cfg.visualizer.vis_backends = None
    with building('model'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about random weights, which are replaced below
        inferencer = Inferencer(cfg, device=device.type)
        dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    check_maps(inferencer.model)
    check_classes(dataset, inferencer.model)
    # The inferencer's own loading runs code in the checkpoint, and only warns about weights that do not fit.
    load_weights(inferencer.model, read_checkpoint(str(checkpoint)), str(checkpoint))
    inferencer.model = revert_sync_batchnorm(inferencer.model).eval()
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = dataset.metainfo
    return inferencer
