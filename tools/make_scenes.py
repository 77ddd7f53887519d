"""Makes a small data set for detection and segmentation from real images: digits of MNIST over photographs.

    vmamba make-scenes --output data/scenes

The folder has the layouts of ADE20K and COCO at once, over the same images:

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png         class of each pixel: 1 the photograph, 2 and on the digits
    annotations/instances_{training,validation}.json   boxes and masks (RLE) of the digits
    scenes.json                                     the arguments, except the folder

A folder that has these scenes already is left as it is.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from vmamba.tools.images.scene_files import write_part
from vmamba.tools.images.scenes import NAMES, PHOTOGRAPHS, Composer
from vmamba.tools.output_files import write_folder
from vmamba.tools.user_errors import Parser, at_least, one_line_errors, positive


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--output', type=Path, required=True, help='folder to make')
    parser.add_argument('--training', type=positive, default=600, help='scenes to learn from')
    parser.add_argument('--validation', type=positive, default=100, help='scenes of other digits and photographs')
    parser.add_argument('--size', type=at_least(96), default=96, help='side of the scenes in pixels')
    parser.add_argument('--digits', type=int, nargs='+', default=(0, 1, 2), choices=range(10), help='the classes')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args(argv)


@one_line_errors('make_scenes.py')
def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    counts = {part: getattr(args, part) for part in PHOTOGRAPHS}
    digits = sorted(set(args.digits))
    settings = {**counts, 'size': args.size, 'seed': args.seed, 'digits': digits}

    def write(folder: Path) -> None:
        for part, count in counts.items():
            write_part(folder, part, Composer(part, (args.size, args.size), digits, args.seed), count)

    if not write_folder(args.output, 'scenes.json', settings, write):
        return print(f'{args.output} has these scenes already')
    classes = ', '.join(NAMES[digit] for digit in digits)
    print(f'Wrote {args.training} + {args.validation} scenes of {classes} to {args.output}')


if __name__ == '__main__':
    main()
