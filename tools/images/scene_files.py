"""Composed scenes in files, with the layouts of ADE20K and COCO at once, over the same images."""

import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from rich.progress import track

from .scenes import Composer, Scene


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
