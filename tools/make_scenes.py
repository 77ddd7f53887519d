"""Makes a small data set for detection and segmentation from real images: digits of MNIST over photographs.

    vmamba make-scenes --output data/scenes

The folder has the layouts of ADE20K and COCO at once, over the same images:

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png         class of each pixel: 1 the photograph, 2 and on the digits
    annotations/instances_{training,validation}.json   boxes and masks (RLE) of the digits
    scenes.json                                     the arguments, except the folder
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

from vmamba.tools.user_errors import Parser, at_least, one_line_errors, positive

PARTS = ('training', 'validation')
RECORD = 'scenes.json'  # in the folder, of what it was made with


def settings_of(args: argparse.Namespace) -> Dict[str, Any]:
    """What decides every byte of the scenes."""
    return {**{name: getattr(args, name) for name in (*PARTS, 'size', 'seed')}, 'digits': sorted(set(args.digits))}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--output', type=Path, required=True, help='folder to make')
    parser.add_argument('--training', type=positive, default=600, help='scenes to learn from')
    parser.add_argument('--validation', type=positive, default=100, help='scenes of other digits and photographs')
    parser.add_argument('--size', type=at_least(96), default=96, help='side of the scenes in pixels')
    parser.add_argument('--digits', type=int, nargs='+', default=(0, 1, 2), choices=range(10), help='the classes')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.is_file():
        parser.error(f'{args.output} is a file; name a folder')
    if args.output.exists() and any(args.output.iterdir()):
        parser.error(f'{args.output} is not empty; remove it or name another folder')
    return args


@one_line_errors('make_scenes.py')
def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    from vmamba.tools.images.scene_files import write_scenes  # here, so that a missing package is one line, too

    classes = write_scenes(args.output, settings_of(args), RECORD)
    print(f'Wrote {args.training} + {args.validation} scenes of {", ".join(classes)} to {args.output}')


if __name__ == '__main__':
    main()
