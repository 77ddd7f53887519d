"""Draws what a detector of mmdet or a segmentor of mmseg sees in an image: boxes and masks, or the segmentation.

vmamba mm-infer image.jpg --config CONFIG --checkpoint work_dirs/NAME/epoch_12.pth --output drawn.png
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Sequence, Tuple

import torch
from vmamba.tools.devices import pick_device
from vmamba.tools.openmmlab.options import add_overrides, file_name
from vmamba.tools.user_errors import UserError, one_line_errors

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn


def infer(args: argparse.Namespace) -> str:
    """Writes the picture; returns what it shows."""
    from mmengine.registry import VISUALIZERS  # here, so that a missing package is one line, too
    from vmamba.tools.openmmlab.configs import load_config
    from vmamba.tools.openmmlab.draw import draw

    check_image(args.image)
    cfg = load_config(args.config, args.cfg_options)
    model, sample = predict(cfg, args)
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=None))
    visualizer.dataset_meta = model.dataset_meta
    draw(visualizer, args.image, sample, args.output, args.threshold, truth=False)
    return summary(sample, model.dataset_meta['classes'], args.threshold)


def check_image(path: Path) -> None:
    """Raises a UserError if there is no image that can be read."""
    import mmcv

    if not path.is_file():
        raise UserError(f'there is no image {path}')
    if mmcv.imread(str(path)) is None:
        raise UserError(f'{path} is no image that can be read')


def predict(cfg: 'Config', args: argparse.Namespace) -> Tuple['nn.Module', Any]:
    """The model with its weights, and what it predicts for the image."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DATASETS, MODELS
    from vmamba.tools.openmmlab.checkpoints import load_weights, read_checkpoint
    from vmamba.tools.openmmlab.checks import check_classes, check_maps
    from vmamba.tools.openmmlab.runs import building

    with building('model'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    check_maps(model)
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    check_classes(dataset, model)
    load_weights(model, read_checkpoint(str(args.checkpoint)), str(args.checkpoint))
    model.cfg = cfg
    model.dataset_meta = dataset.metainfo
    model = model.to(args.device).eval()
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import inference_detector as run
    else:
        from mmseg.apis import inference_model as run
    return model, run(model, str(args.image))


def summary(sample: Any, classes: Sequence[str], threshold: float) -> str:
    """The detections by class and score, or the share of the image that each class takes."""
    if 'pred_instances' in sample:
        found = sample.pred_instances[sample.pred_instances.scores >= threshold]
        names = [f'{classes[label]} {score:.2f}' for label, score in zip(found.labels, found.scores)]
    else:
        counts = (
            torch.bincount(sample.pred_sem_seg.data.flatten(), minlength=len(classes))
            / sample.pred_sem_seg.data.numel()
        )
        names = [f'{classes[i]} {counts[i]:.1%}' for i in counts.argsort(descending=True) if counts[i] > 0]
    return ', '.join(names) or f'nothing with a score of at least {threshold}'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('image', type=Path)
    parser.add_argument(
        '--config', type=Path, required=True, help='config file of mmdet or mmseg, or the name of an installed one'
    )
    parser.add_argument('--checkpoint', type=Path, required=True)
    parser.add_argument(
        '--output', type=file_name('.png', '.jpg'), default=Path('drawn.png'), help='PNG or JPEG to write'
    )
    parser.add_argument('--threshold', type=float, default=0.3, help='least score of a detection to be drawn')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    add_overrides(parser)
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    with one_line_errors('mm_infer.py'):
        shown = infer(args)
        print(f'Wrote {args.output}: {shown}')


if __name__ == '__main__':
    main()
