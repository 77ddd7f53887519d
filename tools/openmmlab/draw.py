"""Predictions drawn over images, for detectors of mmdet and segmentors of mmseg alike."""

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import mmcv
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer


def draw(visualizer: Visualizer, image: Path, sample: Any, output: Path, threshold: float, truth: bool) -> None:
    """Writes a PNG of the boxes and masks or of the segmentation of an image.

    Args:
        visualizer: mmdet's or mmseg's.
        image: The image file.
        sample: What the model predicted for it, and the truth if there is any.
        output: The file to write.
        threshold: Least score of a detection to be drawn.
        truth: Draw the truth on the left of the prediction.
    """
    options: Dict[str, Any] = {'pred_score_thr': threshold} if 'pred_instances' in sample else {}
    pixels = mmcv.imread(str(image), channel_order='rgb')
    output.parent.mkdir(parents=True, exist_ok=True)
    visualizer.add_datasample(output.stem, pixels, sample, draw_gt=truth, out_file=str(output), **options)


@HOOKS.register_module()
class DrawHook(Hook):
    """Draws what a test predicts beside the truth.

    Args:
        folder: Where to write NAME.png for the image NAME.
        threshold: Least score of a detection to be drawn.
        limit: Most images to draw on each process; None for all.
    """

    def __init__(self, folder: str, threshold: float, limit: Optional[int] = None) -> None:
        self._folder, self._threshold, self._left = Path(folder), threshold, limit

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Optional[Sequence[Any]] = None
    ) -> None:
        for sample in outputs:
            if self._left is not None:
                if self._left == 0:
                    return
                self._left -= 1
            image = Path(sample.img_path)
            draw(runner.visualizer, image, sample, self._folder / f'{image.stem}.png', self._threshold, truth=True)
