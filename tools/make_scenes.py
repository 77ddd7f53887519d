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
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

from vmamba.tools.user_errors import Parser, UserError, at_least, one_line_errors, positive

PARTS = ('training', 'validation')
RECORD = 'scenes.json'  # in the folder, of what it was made with


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
    from vmamba.tools.images.scene_files import write_scenes  # here, so that a missing package is one line, too

    settings: Dict[str, Any] = {name: getattr(args, name) for name in (*PARTS, 'size', 'seed')}
    settings['digits'] = sorted(set(args.digits))  # all that decides every byte
    if args.output.exists() and any(args.output.iterdir()):
        record = args.output / RECORD
        found = record.read_text().strip() if record.is_file() else 'something else'
        if found != json.dumps(settings):
            raise UserError(f'{args.output} has {found} instead of {json.dumps(settings)}: move it away')
        return print(f'{args.output} has these scenes already')
    classes = write_scenes(args.output, settings, RECORD)
    print(f'Wrote {args.training} + {args.validation} scenes of {", ".join(classes)} to {args.output}')


if __name__ == '__main__':
    main()
