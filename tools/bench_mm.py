"""Times training steps of Mask R-CNN and UPerNet with VMamba beside Swin in the same framework, with random weights.

vmamba bench mm --docs docs/benchmarks.md
vmamba bench mm --device cpu --shrink 8 --repeats 1 --tasks segmentation
"""

import argparse
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vmamba.configs import FOLDER
from vmamba.tools.user_errors import Parser, one_line_errors, positive

# After vmamba.tools, which makes a missing package an error of one line:
# isort: split
import mmcv
import mmdet
import mmengine
import mmseg
import pandas as pd
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner

from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.timing import is_out_of_memory, median_ms, peak_mib, settled_memory
from vmamba.tools.devices import add_device_option
from vmamba.tools.images.scene_files import write_part
from vmamba.tools.images.scenes import BACKGROUND, NAMES, Composer
from vmamba.tools.openmmlab.configs import load_config  # lets mmdet do without mmcv's compiled operators
from vmamba.tools.terminal import open_console

from rich.progress import track

BATCHES = 8  # different ones, taken in turn
SWIN: Dict[str, Any] = dict(
    type='SwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    patch_norm=True,
    drop_path_rate=0.2,
    out_indices=(0, 1, 2, 3),
)
BACKBONES = {
    'swin_t': SWIN,
    'vmamba_t': dict(type='VMambaBackbone', variant='vmamba_t', drop_path_rate=0.2),
}
NOTES = """Whole training steps in {precision}: images to the device, forward, backward and AdamW, of the recipes under
configs/ with random weights; Swin is mmdet's or mmseg's own, in the same model. Medians of {repeats} steps after
{warm_ups}, on {batches} batches of composed scenes in turn, held in memory. The peak is that of PyTorch's allocator,
weights, gradients and optimizer included."""


class Task(NamedTuple):
    """A model and what it is trained on: batches of images of this height and width."""

    title: str
    config: str
    shape: Tuple[int, int]
    batch: int


TASKS = {
    'detection': Task('Mask R-CNN', 'detection/mask-rcnn_vmamba-t_fpn_amp-1x_coco.py', (800, 1333), 2),
    'segmentation': Task('UPerNet', 'segmentation/vmamba-t_upernet_8xb2-amp-160k_ade20k-512x512.py', (512, 512), 4),
}


def measure(task: Task, backbone: str, batches: Sequence[Any], device: torch.device, repeats: int) -> Dict[str, Any]:
    """A row of the table, of training steps; running out of memory is a result."""
    height, width = task.shape
    row = {'model': task.title, 'image': f'{width}x{height}', 'batch': task.batch, 'backbone': backbone}
    settled_memory(device)
    try:
        model, optimizer = build(task, backbone, device)
        batch = cycle(batches)

        def step() -> None:
            model.train_step(next(batch), optimizer)

        for _ in range(warm_ups(device)):
            step()
        peak = peak_mib(lambda: [step() for _ in batches], device, 0) if device.type == 'cuda' else None
        ms = median_ms(step, device, repeats, 0)
        return {**row, 'images/s': 1e3 * task.batch / ms, 'ms per step': ms, 'peak MiB': peak}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {**row, 'images/s': 'OOM', 'ms per step': None, 'peak MiB': None}


def warm_ups(device: torch.device) -> int:
    """Steps before the first measured one: as many as there are batches, for the memory of each to be known."""
    return BATCHES if device.type == 'cuda' else 0


def build(task: Task, backbone: str, device: torch.device) -> Tuple[BaseModel, OptimWrapper]:
    """The model of the task's config with this backbone, and its optimizer."""
    cfg = load_config(FOLDER / task.config)
    cfg.model.backbone = BACKBONES[backbone]
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = task.shape
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = revert_sync_batchnorm(model).to(device).train()
    settings = dict(cfg.optim_wrapper, constructor='DefaultOptimWrapperConstructor')
    if device.type != 'cuda':
        settings = dict(type='OptimWrapper', optimizer=settings['optimizer'])
    return model, build_optim_wrapper(model, settings)


def compose(task: Task, folder: Path) -> List[Any]:
    """Batches of scenes of the task's size, as the task's library reads and packs them."""
    write_part(folder, 'training', Composer('training', task.shape, range(10), seed=0), BATCHES * task.batch)
    cfg = load_config(FOLDER / task.config)
    if cfg.default_scope == 'mmdet':
        source = dict(
            type='CocoDataset',
            ann_file='annotations/instances_training.json',
            data_prefix=dict(img='images/training/'),
            metainfo=dict(classes=NAMES),
        )
        steps = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True), dict(type='PackDetInputs')]
    else:
        source = dict(
            type='BaseSegDataset',
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
            metainfo=dict(classes=(BACKGROUND, *NAMES)),
            reduce_zero_label=True,
        )
        steps = [dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]
    dataset = dict(source, data_root=str(folder), pipeline=[dict(type='LoadImageFromFile'), *steps])
    sampler = dict(type='DefaultSampler', shuffle=False)
    return list(Runner.build_dataloader(dict(dataset=dataset, sampler=sampler, batch_size=task.batch, num_workers=0)))


def report_of(rows: Sequence[Dict[str, Any]], device: torch.device, repeats: int, arguments: Sequence[str]) -> Report:
    table = pd.DataFrame(rows)
    swin = table[table.backbone == 'swin_t'].set_index('model')['ms per step']
    table["speed against Swin-T's"] = table.model.map(swin) / table['ms per step']
    facts = facts_of(device, 'bench mm', arguments)
    modules = {'mmengine': mmengine, 'mmcv': mmcv, 'mmdet': mmdet, 'mmseg': mmseg}  # OpenMMLab's or the onedl forks
    facts['versions'] += ''.join(f', {name} {module.__version__}' for name, module in modules.items())
    how = dict(precision='bf16' if device.type == 'cuda' else 'fp32', warm_ups=warm_ups(device), batches=BATCHES)
    return Report('bench_mm', 'Detection and segmentation', facts, [table], NOTES.format(repeats=repeats, **how))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--tasks', nargs='+', choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument('--backbones', nargs='+', choices=tuple(BACKBONES), default=tuple(BACKBONES))
    parser.add_argument('--shrink', type=positive, default=1, help="divide the images' sides, for a try on a CPU")
    add_device_option(parser)
    parser.add_argument('--repeats', type=positive, default=40, help='steps of which the median time is taken')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table')
    return parser.parse_args(argv)


@one_line_errors('bench_mm.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    MMLogger.get_instance('bench_mm', log_level='WARNING')  # else every parameter's initialisation is shown
    rows = []
    for task in map(TASKS.get, args.tasks):
        task = task._replace(shape=tuple(side // args.shrink for side in task.shape))
        with tempfile.TemporaryDirectory() as folder:
            batches = compose(task, Path(folder))
        for backbone in track(args.backbones, f'Training {task.title}'):
            rows.append(measure(task, backbone, batches, args.device, args.repeats))
    report_of(rows, args.device, args.repeats, argv).publish(open_console(), args.docs)


if __name__ == '__main__':
    main()
