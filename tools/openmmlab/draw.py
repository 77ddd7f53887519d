"""Predictions of detectors and segmentors, drawn over images."""

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import mmcv
import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer


def draw(visualizer: Visualizer, image: np.ndarray, sample: Any, output: Path, threshold: float, truth: bool) -> None:
    """Writes a picture of the boxes and masks, or of the segmentation, of an image [H, W, 3] in BGR.

    The ground truth is drawn on the left of the prediction, if asked for. Detections below the threshold are left out.
    """
    options: Dict[str, Any] = {'pred_score_thr': threshold} if 'pred_instances' in sample else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    visualizer.add_datasample(output.stem, image[..., ::-1], sample, draw_gt=truth, out_file=str(output), **options)


@HOOKS.register_module()
class DrawHook(Hook):
    """Draws the predictions of a test beside the ground truth.

    Args:
        folder: Where to write NAME.png for the image NAME.
        threshold: Lowest score of a drawn detection.
        limit: Most images to draw in each process; None for all.
    """

    def __init__(self, folder: str, threshold: float, limit: Optional[int] = None) -> None:
        self._folder, self._threshold, self._limit, self._drawn = Path(folder), threshold, limit, 0

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[Sequence[Any]] = None
    ) -> None:
        for sample in outputs[: None if self._limit is None else max(self._limit - self._drawn, 0)]:
            output = self._folder / f'{Path(sample.img_path).stem}.png'
            draw(runner.visualizer, mmcv.imread(sample.img_path), sample, output, self._threshold, truth=True)
            self._drawn += 1
