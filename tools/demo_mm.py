"""Trains Mask R-CNN and UPerNet with vmamba_nano from scratch on scenes of real images, and tests and draws them.

Makes data/scenes if it is not there, and refuses other scenes; writes checkpoints, metrics and pictures. Exits with an
error below the required box mAP, mask mAP and mIoU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Optional, Sequence

import pandas as pd

from vmamba.configs import FOLDER
from vmamba.tools.terminal import table_of
from vmamba.tools.user_errors import Parser, one_line_errors

from rich.console import Console

SCENES = Path('data/scenes')  # where the configs look for them
WITHOUT_VALIDATION = ('val_cfg=None', 'val_dataloader=None', 'val_evaluator=None')  # the test comes right after


# Configs, and the least values of their metrics.
TRAININGS = {
    'detection/mask-rcnn_vmamba-nano_fpn_scenes.py': {'coco/bbox_mAP': 0.30, 'coco/segm_mAP': 0.30},
    'segmentation/vmamba-nano_upernet_scenes.py': {'mIoU': 50.0},
}


def run(tool: str, *arguments: object) -> None:
    """Runs one of the tools in a process of its own; its failure ends the demo."""
    command = [sys.executable, str(Path(__file__).with_name(tool)), *map(str, arguments)]
    if status := subprocess.run(command).returncode:
        sys.exit(status)


def train_and_test(name: str, output: Path, options: Sequence[str]) -> Dict[str, float]:
    """Metrics of a training from scratch; its folder also has the checkpoints and drawn predictions."""
    config, folder = FOLDER / name, output / Path(name).parent
    overrides = ['--cfg-options', *options] if options else []
    run('mm_train.py', config, '--output', folder, '--cfg-options', *WITHOUT_VALIDATION, *options)
    checkpoint = (folder / 'last_checkpoint').read_text()
    metrics = folder / 'metrics.json'
    drawing = ['--draw', folder / 'drawn', '--limit', 16]
    run('mm_test.py', config, checkpoint, '--work-dir', folder, '--output', metrics, *drawing, *overrides)
    return json.loads(metrics.read_text())


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--output', type=Path, default=Path('demo-mm'), help='folder of the results')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for both configs')
    return parser.parse_args(argv)


@one_line_errors('demo_mm.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    run('make_scenes.py', '--output', SCENES)
    rows = []
    for config, required in TRAININGS.items():
        begin = time.perf_counter()
        metrics = train_and_test(config, args.output, args.cfg_options)
        seconds = round(time.perf_counter() - begin)
        for name, least in required.items():
            rows.append(dict(config=config, metric=name, value=metrics[name], required=least, seconds=seconds))
    Console().print(table_of(pd.DataFrame(rows), 'Scenes, trained from scratch'))
    print(f'Done in {time.perf_counter() - start:.0f} s; results are in {args.output}/')
    low = [row for row in rows if not row['value'] >= row['required']]
    if low:
        missed = ', '.join(f'{row["metric"]} {row["value"]:.3f} instead of {row["required"]:.2f}' for row in low)
        sys.exit(f'below what is required: {missed}')


if __name__ == '__main__':
    main()
