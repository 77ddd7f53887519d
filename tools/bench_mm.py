"""Times training steps of Mask R-CNN and UPerNet with VMamba beside Swin in the same framework, with random weights.

python tools/bench_mm.py --docs docs/benchmarks.md
python tools/bench_mm.py --device cpu --shrink 8 --repeats 1 --tasks segmentation
"""

import argparse
import statistics
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import mmcv
import mmengine
import timm
import torch
from make_scenes import write_part
from measure import device_name, is_out_of_memory, pick_device
from mm_runs import load_config
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scenes import BACKGROUND, NAMES, Composer
from sections import command_of, markdown_table, replace_section
from timing import MIB, peak_mib, settled_memory, triton_version

CONFIGS = Path(__file__).parents[1] / 'configs'
OUTPUTS = ('--docs',)
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
HEADER = ('model', 'image', 'batch', 'backbone', 'images/s', 'ms a step', 'peak MiB', "images/s against Swin-T's")
NOTES = """Whole training steps in {precision}: images to the device, forward, backward, clipping where the recipe has it,
AdamW. Medians of {repeats} steps after {warm_ups}, on {batches} batches of composed scenes in turn, held in memory; weights
are random. The peak is that of PyTorch's allocator, with weights, gradients and optimizer."""


class Task(NamedTuple):
    """A model and what it is trained on.

    Attributes:
        title: Its name in tables.
        config: Under configs/, with VMamba-T.
        shape: Height and width of the images.
        batch: Images a step.
    """

    title: str
    config: str
    shape: Tuple[int, int]
    batch: int


TASKS = {
    'detection': Task('Mask R-CNN', 'detection/mask-rcnn_vmamba-t_fpn_1x_coco.py', (800, 1333), 2),
    'segmentation': Task('UPerNet', 'segmentation/upernet_vmamba-t_160k_ade20k-512x512.py', (512, 512), 4),
}


class Result(NamedTuple):
    """Median seconds of a step and peak memory in MiB; None where it was not measured, with the reason."""

    task: Task
    backbone: str
    seconds: Optional[float] = None
    peak: Optional[float] = None
    message: str = ''

    @property
    def speed(self) -> Optional[float]:
        return self.seconds and self.task.batch / self.seconds


def measure(task: Task, backbone: str, batches: Sequence[Any], device: torch.device, repeats: int) -> Result:
    """Measures training steps; running out of memory is a result."""
    try:
        settled_memory(device)
        model, optimizer = build(task, backbone, device)
        return Result(task, backbone, *time_steps(model, optimizer, batches, device, repeats))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Result(task, backbone, message='out of memory')


def build(task: Task, backbone: str, device: torch.device) -> Tuple[BaseModel, OptimWrapper]:
    """The model of the task's config with this backbone, and its optimizer."""
    cfg = load_config(CONFIGS / task.config)
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


def time_steps(
    model: BaseModel, optimizer: OptimWrapper, batches: Sequence[Any], device: torch.device, repeats: int
) -> Tuple[float, Optional[float]]:
    """Median seconds of a step, and the peak of the memory in MiB."""
    batch = cycle(batches)

    def steps(count: int) -> List[float]:
        return [timed(lambda: model.train_step(next(batch), optimizer), device) for _ in range(count)]

    steps(warm_ups(device, batches))
    peak = peak_mib(lambda: steps(len(batches)), device, 0)
    return statistics.median(steps(repeats)), peak
