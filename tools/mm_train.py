"""Trains a detector of mmdet or a segmentor of mmseg from its config, on a CPU, a GPU or, under torchrun, several.

    vmamba mm-train mask-rcnn_vmamba-t_fpn_amp-1x_coco
    vmamba mm-train mask-rcnn_vmamba-t_fpn_amp-1x_coco --resume
    torchrun --nproc-per-node 8 -m vmamba.tools.mm_train CONFIG --launcher pytorch --auto-scale-lr

A killed training resumes from its last checkpoint with --resume, and ends with the weights that it would have had.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Optional, Sequence

import torch

from vmamba.tools.openmmlab.configs import (
    Config,
    add_config_options,
    is_first_process,
    join_processes,
    load_config,
    set_work_dir,
)
from vmamba.tools.openmmlab.resume import choose_start, make_resumable
from vmamba.tools.openmmlab.runs import build_runner
from vmamba.tools.output_files import lock_folder
from vmamba.tools.training.parallel import check_version
from vmamba.tools.user_errors import Parser, UserError, one_line_errors


@one_line_errors('mm_train.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    set_work_dir(cfg, args.config, args.output)
    join_processes(cfg, args.launcher)
    cfg.visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
    cfg.visualizer.vis_backends += [dict(type='TensorboardVisBackend')]
    set_precision(cfg, args.precision)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(f'{args.config} has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs')
        cfg.auto_scale_lr.enable = True
    if args.fsdp:
        check_version('cuda' if torch.cuda.is_available() else 'cpu')
        import vmamba.tools.openmmlab.sharding  # noqa: F401 - registers the runner

        cfg.runner_type = 'ShardedRunner'
    with lock_folder(Path(cfg.work_dir)) if is_first_process(args.launcher) else nullcontext():
        choose_start(cfg, args.resume, args.fresh)
        make_resumable(cfg)
        build_runner(cfg).train()


def set_precision(cfg: Config, precision: Optional[str]) -> None:
    """bf16 mixed precision, fp32, or what the config says.

    Raises:
        UserError: If mixed precision has no GPU.
    """
    if precision == 'bf16':  # it has fp32's range, so losses need no scaling
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    elif precision == 'fp32':
        cfg.optim_wrapper = {key: v for key, v in cfg.optim_wrapper.items() if key not in ('dtype', 'loss_scale')}
        cfg.optim_wrapper.type = 'OptimWrapper'
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and not torch.cuda.is_available():
        raise UserError('mixed precision needs a GPU, and PyTorch finds none; --precision fp32 trains without')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_config_options(parser)
    parser.add_argument(
        '--output', '--work-dir', type=Path, help='folder of logs and checkpoints; default: work_dirs/CONFIG'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        metavar='CHECKPOINT',
        help='resume from this checkpoint, by default from the last in the work folder, if there is one',
    )
    parser.add_argument(
        '--fresh',
        nargs='+',
        default=(),
        metavar='MODULE',
        help='modules or weights to re-initialise, such as heads for other classes, where load_from has all the others',
    )
    parser.add_argument(
        '--precision', choices=('fp32', 'bf16'), help="bf16: automatic mixed precision; default: the config's"
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate by the batch size against the config's"
    )
    parser.add_argument('--fsdp', action='store_true', help='shard weights and optimizer over the processes')
    args = parser.parse_args(argv)
    if args.fsdp and args.launcher == 'none':
        parser.error('--fsdp shards over processes: run it under torchrun with --launcher pytorch')
    return args


if __name__ == '__main__':
    main()
