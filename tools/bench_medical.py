"""Times U-Mamba at the patch sizes of its published plans, beside the same network without Mamba and nnU-Net's
residual encoder U-Net.

vmamba bench medical --docs docs/benchmarks.md
vmamba bench medical --patches abdomen-ct-3d --networks none enc --precision bf16 --compile
vmamba bench medical --device cpu --shrink 8 --repeats 1
"""

import argparse
import sys
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from vmamba.models import UMamba
from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.timing import is_out_of_memory, median_and_peak, settled_memory
from vmamba.tools.devices import DTYPES, add_device_option, autocast
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, one_line_errors, positive

from rich.progress import track

PEER = 'resenc'
NETWORKS: Dict[str, Dict[str, str]] = {
    'none': dict(kind='bot', mixer='none'),
    'bot': dict(kind='bot'),
    'enc': dict(kind='enc'),
    'bot-mamba2': dict(kind='bot', mixer='mamba2'),
    'enc-mamba2': dict(kind='enc', mixer='mamba2'),
    PEER: {},
}
DEFAULT_NETWORKS = ('none', 'bot', 'enc', PEER)
WARM_UPS = {'cuda': 5, 'cpu': 0}
MEASURED = 'training, ms', 'training, MiB', 'inference, ms', 'inference, MiB'
NOTES = """Random images and weights; `none` is U-Mamba without Mamba, `resenc` ResidualEncoderUNet of
dynamic-network-architectures with nnU-Net's numbers of blocks. A training step is forward with deep supervision,
cross-entropy of all outputs, backward, clipping of the gradient and SGD with momentum, for fp16 with scaled losses.
Inference is the forward pass at full resolution, without gradients. Autocast to the precision; cuDNN chooses its
algorithms by timing them, as in nnU-Net. Medians of {repeats} passes. Peaks are those of PyTorch's allocator, with
weights, gradients and momentum in training."""


class Plan(NamedTuple):
    """A published plan: sizes of the patch, the batch and the stages."""

    patch_size: Tuple[int, ...]
    batch: int
    in_chans: int
    num_classes: int
    features: Tuple[int, ...]
    kernel_sizes: Tuple[Tuple[int, ...], ...]
    strides: Tuple[Tuple[int, ...], ...]

    def sizes(self) -> Dict[str, Any]:
        """Arguments of UMamba."""
        return {key: value for key, value in self._asdict().items() if key != 'batch'}


_ABDOMEN = dict(
    batch=2,
    in_chans=1,
    num_classes=14,
    features=(32, 64, 128, 256, 320, 320),
    kernel_sizes=((1, 3, 3), *((3, 3, 3),) * 5),
    strides=((1, 1, 1), (1, 2, 2), *((2, 2, 2),) * 3, (1, 2, 2)),
)
PLANS = {
    'microscopy-2d': Plan(
        *((512, 512), 12, 3, 3, (32, 64, 128, 256, 512, 512, 512, 512)), ((3, 3),) * 8, ((1, 1), *((2, 2),) * 7)
    ),
    'abdomen-ct-3d': Plan(patch_size=(40, 224, 192), **_ABDOMEN),
    'abdomen-mr-3d': Plan(patch_size=(48, 160, 224), **_ABDOMEN),
}


def build(name: str, plan: Plan) -> nn.Module:
    """A network with deep supervision."""
    if name != PEER:
        return UMamba(**NETWORKS[name], **plan.sizes(), deep_supervision=True)
    from vmamba.tools.segmentation.peers import residual_encoder_unet

    sizes = plan.in_chans, plan.num_classes, plan.features, plan.kernel_sizes, plan.strides
    return residual_encoder_unet(*sizes, deep_supervision=True, ndim=len(plan.patch_size))


def training_step(network: nn.Module, plan: Plan, precision: str, device: torch.device) -> Callable[[], None]:
    """A training step on random data."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    images = torch.randn(plan.batch, plan.in_chans, *plan.patch_size, device=device)
    with torch.no_grad():
        shapes = [(plan.batch, *y.shape[2:]) for y in network(images)]
    targets = [torch.randint(plan.num_classes, shape, device=device) for shape in shapes]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = sum(F.cross_entropy(y, target) for y, target in zip(network(images), targets))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()

    return step


def measure(
    name: str, patch: str, plan: Plan, precision: str, compiles: bool, device: torch.device, repeats: int
) -> Dict[str, Any]:
    """A row of the table; running out of memory is a result."""
    size = 'x'.join(map(str, plan.patch_size))
    row: Dict[str, Any] = dict(patch=patch, size=size, batch=plan.batch, precision=precision, network=name)
    how = device, repeats, settled_memory(device), WARM_UPS[device.type]
    try:
        network = build(name, plan).to(device)
        runs = torch.compile(network) if compiles else network
        step = training_step(runs, plan, precision, device)
        row.update(zip(MEASURED[:2], median_and_peak(step, *how)))
        del step
        network.zero_grad(set_to_none=True)
        network.eval().decoder.deep_supervision = False
        images = torch.randn(plan.batch, plan.in_chans, *plan.patch_size, device=device)
        with torch.no_grad(), autocast(device, precision):
            row.update(zip(MEASURED[2:], median_and_peak(lambda: runs(images), *how)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        row[MEASURED[0]] = 'OOM'
    finally:
        torch.compiler.reset()
    return row


def with_ratios(rows: Sequence[Dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table, with time and memory over those of the network without Mamba."""
    table = pd.DataFrame(rows)
    for column in [column for column in MEASURED if column in table]:
        own = pd.to_numeric(table[column], errors='coerce')
        without = own.where(table.network == 'none').groupby([table.patch, table.precision]).transform('max')
        if without.notna().any():
            table[f'{column} / none'] = own / without
    return table


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--patches', nargs='+', choices=tuple(PLANS), default=tuple(PLANS))
    parser.add_argument('--networks', nargs='+', choices=tuple(NETWORKS), default=DEFAULT_NETWORKS)
    parser.add_argument('--precision', nargs='+', choices=tuple(DTYPES), help='default: bf16 and fp16; fp32 on a CPU')
    parser.add_argument('--compile', action='store_true', help='compile the networks, as nnU-Net does')
    parser.add_argument('--shrink', type=positive, default=1, help='divide the sides and channels, for a try on a CPU')
    add_device_option(parser)
    parser.add_argument('--repeats', type=positive, default=20, help='passes of which the median time is taken')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table')
    args = parser.parse_args(argv)
    args.precision = args.precision or (('bf16', 'fp16') if args.device.type == 'cuda' else ('fp32',))
    return args


def shrunk(plan: Plan, factor: int) -> Plan:
    """The plan with smaller sides that its strides still divide, at most as many channels, and one image."""
    if factor == 1:
        return plan
    totals = [prod(axis) for axis in zip(*plan.strides)]
    sides = [max(side // factor // total, 2) * total for side, total in zip(plan.patch_size, totals)]
    features = tuple(max(channels // factor, 2) for channels in plan.features)
    return plan._replace(patch_size=tuple(sides), batch=1, features=features)


@one_line_errors('bench_medical.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    cases = list(product(args.patches, args.precision, args.networks))
    torch.backends.cudnn.benchmark = True
    rows = [
        measure(name, patch, shrunk(PLANS[patch], args.shrink), precision, args.compile, args.device, args.repeats)
        for patch, precision, name in track(cases, 'Measuring')
    ]
    name, title = ('bench_medical compiled', ', compiled') if args.compile else ('bench_medical', '')
    facts, notes = facts_of(args.device, 'bench medical', argv), NOTES.format(repeats=args.repeats)
    report = Report(name, f'U-Mamba at published patch sizes{title}', facts, [with_ratios(rows)], notes)
    report.publish(open_console(200), args.docs)


if __name__ == '__main__':
    main()
