"""Tests a trained detector of mmdet or segmentor of mmseg: writes its metrics as JSON, and drawn predictions.

vmamba mm-test CONFIG work_dirs/NAME/epoch_12.pth --output metrics.json --draw drawn
torchrun --nproc-per-node 8 -m vmamba.tools.mm_test CONFIG CHECKPOINT --launcher pytorch
"""

import argparse
import json
from pathlib import Path
from typing import Optional, Sequence

from vmamba.tools.openmmlab.configs import (
    Config,
    add_config_options,
    is_first_process,
    join_processes,
    leaves,
    load_config,
    set_work_dir,
)
from vmamba.tools.openmmlab.runs import add_hook, build_runner
from vmamba.tools.output_files import write_text
from vmamba.tools.user_errors import Parser, UserError, file_name, one_line_errors, positive


@one_line_errors('mm_test.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    set_work_dir(cfg, args.config, args.work_dir)
    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise UserError(f'{args.config} has no test_dataloader or no test_evaluator')
    cfg.load_from, cfg.resume, cfg.fresh = str(args.checkpoint), False, ()
    if args.tta:
        augment(cfg, args.config)
    join_processes(cfg, args.launcher)
    if args.draw:
        import vmamba.tools.openmmlab.draw  # noqa: F401 - registers the hook

        add_hook(cfg, type='DrawHook', folder=str(args.draw), threshold=args.threshold, limit=args.limit)
    metrics = {name: float(value) for name, value in build_runner(cfg).test().items()}
    if is_first_process(args.launcher):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(metrics, indent=2) + '\n')
        print(f'Wrote {args.output}: {", ".join(f"{name} {value:.4g}" for name, value in metrics.items())}')


def augment(cfg: Config, path: Path) -> None:
    """Makes the model see each image in the variants of the config's `tta_pipeline`, and merge its predictions.

    Raises:
        UserError: If the config does not say how, or its model predicts what cannot be merged.
    """
    for key in ('tta_model', 'tta_pipeline'):
        if cfg.get(key) is None:
            raise UserError(f'{path} has no {key}, which --tta needs')
    if cfg.tta_model.type == 'DetTTAModel' and cfg.model.get('roi_head', {}).get('mask_head'):
        raise UserError(f'the DetTTAModel of {path} merges boxes, not masks: --tta needs a detector without mask_head')
    for dataset in leaves(cfg.test_dataloader.dataset):
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_config_options(parser)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--work-dir', type=Path, help='folder of logs; default: work_dirs/CONFIG')
    parser.add_argument(
        '--output', type=file_name('.json'), default=Path('metrics.json'), help='JSON file of the metrics'
    )
    parser.add_argument('--draw', type=Path, metavar='FOLDER', help='draw predictions as FOLDER/IMAGE.png')
    parser.add_argument('--limit', type=positive, help='most images to draw')
    parser.add_argument('--threshold', type=float, default=0.3, help='lowest score of a drawn detection')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation, such as several scales, by the config's tta_pipeline",
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
