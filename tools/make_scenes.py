"""Makes a small data set for detection and segmentation from real images: digits of MNIST over photographs.

    python tools/make_scenes.py --output data/scenes

The folder has the layouts of ADE20K and COCO at once, over the same images:

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png         class of each pixel: 1 the photograph, 2 and on the digits
    annotations/instances_{training,validation}.json   boxes and masks (RLE) of the digits
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from images.scenes import NAMES, PHOTOGRAPHS, Composer, Scene
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import track


def write_part(output: Path, part: str, composer: Composer, count: int) -> None:
    """Writes the scenes 0 to `count` of a part, and what is in them."""
    images, maps = output / 'images' / part, output / 'annotations' / part
    for folder in (images, maps):
        folder.mkdir(parents=True)
    coco: Dict[str, List[Dict[str, Any]]] = {
        'images': [],
        'annotations': [],
        'categories': [{'id': number, 'name': name} for number, name in enumerate(composer.classes, 1)],
    }
    for number in track(range(count), f'Composing {part}'):
        scene = composer(number)
        name = f'{part}_{number:05d}'
        Image.fromarray(scene.image).save(images / f'{name}.jpg', quality=95)
        Image.fromarray(scene.index_map()).save(maps / f'{name}.png')
        height, width = composer.shape
        coco['images'].append({'id': number + 1, 'file_name': f'{name}.jpg', 'width': width, 'height': height})
        coco['annotations'] += annotations_of(scene, number + 1, len(coco['annotations']) + 1)
    (output / 'annotations' / f'instances_{part}.json').write_text(json.dumps(coco))


def annotations_of(scene: Scene, image_id: int, first_id: int) -> List[Dict[str, Any]]:
    """COCO's annotations of the digits, with run-length encoded masks and the boxes around these."""
    annotations = []
    for label, mask in zip(scene.labels, scene.masks):
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        annotations.append(
            {
                'id': first_id + len(annotations),
                'image_id': image_id,
                'category_id': label + 1,
                'bbox': coco_mask.toBbox(encoded).tolist(),
                'area': int(coco_mask.area(encoded)),
                'segmentation': {'size': encoded['size'], 'counts': encoded['counts'].decode()},
                'iscrowd': 0,
            }
        )
    return annotations


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, required=True, help='folder to make')
    parser.add_argument('--training', type=int, default=600, help='scenes to learn from')
    parser.add_argument('--validation', type=int, default=100, help='scenes of other digits and photographs')
    parser.add_argument('--size', type=int, default=96, help='side of the scenes in pixels')
    parser.add_argument('--digits', type=int, nargs='+', default=(0, 1, 2), choices=range(10), help='the classes')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    for name in ('training', 'validation'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    if args.size < 96:
        parser.error(f'--size must be at least 96, got {args.size}')
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f'{args.output} is not empty; remove it or name another folder')
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    digits = sorted(set(args.digits))
    for part in PHOTOGRAPHS:
        write_part(args.output, part, Composer(part, (args.size, args.size), digits, args.seed), getattr(args, part))
    print(f'Wrote {args.training} + {args.validation} scenes of {", ".join(NAMES[d] for d in digits)} to {args.output}')


if __name__ == '__main__':
    main()
