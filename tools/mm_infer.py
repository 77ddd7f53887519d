"""Predicts the objects or the segmentation of images and videos with a detector of mmdet or a segmentor of mmseg.

    vmamba mm-infer photo.jpg folder film.mp4 --config CONFIG --checkpoint work_dirs/NAME/epoch_12.pth --output out

out/vis/NAME.png is the drawn prediction. For a detector, out/preds/NAME.json has labels, class names, scores, boxes and
masks (COCO's run lengths). For a segmentor, out/preds/NAME.png has the class of each pixel.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
from PIL import Image

from vmamba.tools.devices import add_device_option
from vmamba.tools.images.image_files import find_images, has_image_ending
from vmamba.tools.openmmlab.configs import load_config
from vmamba.tools.openmmlab.draw import draw
from vmamba.tools.openmmlab.inference import VIDEOS, build_inferencer, frame_count, frames_of
from vmamba.tools.openmmlab.options import add_overrides
from vmamba.tools.output_files import write_text, writing
from vmamba.tools.user_errors import Parser, UserError, one_line_errors

from rich.progress import track


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
