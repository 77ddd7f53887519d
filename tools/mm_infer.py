"""Predicts the objects or the segmentation of images and videos with a detector of mmdet or a segmentor of mmseg.

    vmamba mm-infer photo.jpg folder film.mp4 --config CONFIG --checkpoint work_dirs/NAME/epoch_12.pth --output out

out/vis/NAME.png is the drawn prediction. For a detector, out/preds/NAME.json has labels, class names, scores, boxes and
masks (COCO's run lengths). For a segmentor, out/preds/NAME.png has the class of each pixel.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

from vmamba.tools.user_errors import Parser, UserError, one_line_errors

# After vmamba.tools, which makes a missing package an error of one line:
# isort: split
import cv2
import mmcv
import numpy as np
import torch
from mmengine.infer import BaseInferencer
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS
from PIL import Image

from vmamba.tools.devices import add_device_option
from vmamba.tools.images.image_files import find_images, has_image_ending
from vmamba.tools.openmmlab.checkpoints import load_weights, read_checkpoint
from vmamba.tools.openmmlab.checks import check_classes, check_maps
from vmamba.tools.openmmlab.configs import Config, add_overrides, load_config
from vmamba.tools.openmmlab.draw import draw
from vmamba.tools.openmmlab.runs import building
from vmamba.tools.output_files import write_text, writing

from rich.progress import track

VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


@one_line_errors('mm_infer.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    files = files_of(args.inputs)
    inferencer = build_inferencer(load_config(args.config, args.cfg_options), args.checkpoint, args.device)
    classes = inferencer.model.dataset_meta['classes']
    frames = (frame for name, path in files.items() for frame in frames_of(name, path))
    for frame, image in track(frames, 'Predicting', sum(map(frame_count, files.values()))):
        sample = inferencer.forward(inferencer.collate_fn([inferencer.pipeline(image)]))[0].cpu()
        with writing(args.output):
            drawn = args.output / f'vis/{frame}.png'
            draw(inferencer.visualizer, image, sample, drawn, args.threshold, truth=False)
            target = args.output / f'preds/{frame}'
            target.parent.mkdir(parents=True, exist_ok=True)
            if 'pred_instances' in sample:
                found = inferencer.pred2dict(sample)
                found['names'] = [classes[label] for label in found['labels']]
                write_text(target.with_name(f'{target.name}.json'), json.dumps(found) + '\n')
            else:
                Image.fromarray(sample.pred_sem_seg.data[0].numpy().astype(np.uint8)).save(f'{target}.png')
        print(f'{frame}: {summary(sample, classes, args.threshold)}')


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


def files_of(inputs: Sequence[Path]) -> Dict[str, Path]:
    """Images and videos by the names of their results: those of folders with their path in the folder.

    Raises:
        UserError: If an input does not exist, a folder has none, or two have the same name.
    """
    files: Dict[str, Path] = {}
    for path in inputs:
        for file in find_images(path, VIDEOS):
            name = str((file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix(''))
            if name in files:
                raise UserError(f'{files[name]} and {file} would both be written as {name}: use an --output for each')
            files[name] = file
    return files


def summary(sample: Any, classes: Sequence[str], threshold: float) -> str:
    """The detections by class and score, or the share of the image that each class takes."""
    if 'pred_instances' in sample:
        found = sample.pred_instances[sample.pred_instances.scores >= threshold]
        names = [f'{classes[label]} {score:.2f}' for label, score in zip(found.labels, found.scores)]
        return ', '.join(names) or f'nothing with a score of at least {threshold}'
    labels = sample.pred_sem_seg.data
    shares = torch.bincount(labels.flatten(), minlength=len(classes)) / labels.numel()
    return ', '.join(f'{classes[i]} {shares[i]:.1%}' for i in shares.argsort(descending=True) if shares[i] > 0)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('inputs', type=Path, nargs='+', metavar='INPUT', help='images, folders of them, or videos')
    parser.add_argument(
        '--config', type=Path, required=True, help='config file of mmdet or mmseg, or the name of an installed one'
    )
    parser.add_argument('--checkpoint', type=Path, required=True)
    parser.add_argument('--output', type=Path, default=Path('predicted'), metavar='FOLDER', help='folder to write to')
    parser.add_argument('--threshold', type=float, default=0.3, help='lowest score of a drawn detection')
    add_device_option(parser)
    add_overrides(parser)
    args = parser.parse_args(argv)
    if has_image_ending(args.output.name):
        parser.error(f'--output is a folder, got {str(args.output)!r}')
    return args


if __name__ == '__main__':
    main()
