"""Size and time of models as ONNX files on the CPU, beside PyTorch, with fp32 and int8 weights.

With --runs instead the accuracy of trained models, on the validation images of their runs.

vmamba bench export --docs docs/benchmarks.md
vmamba bench export --runs runs/int8/vmamba_nano runs/int8/vim_nano --docs docs/benchmarks.md
"""

import argparse
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

import vmamba
from vmamba.export import OnnxFile, export_onnx
from vmamba.tools import weights
from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.timing import MIB
from vmamba.tools.images.batches import Images
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import load_config
from vmamba.tools.training.splits import load_datasets
from vmamba.tools.user_errors import Parser, as_user_error, one_line_errors, positive

import psutil
from rich.progress import track

CPU = torch.device('cpu')
MODELS = ('vmamba_t', 'vim_t', 'vssd_t', 'mambavision_t')
WEIGHTS = ('fp32', 'int8')
THREADS = 2  # of wall times
BATCH = 50  # images, for accuracies
NOTES = """\
One image at the model's own size, with random weights. CPU time is that of the process on one thread, which other work
on the machine disturbs little: medians of {repeats} passes, PyTorch and ONNX Runtime in turn.{wall} PyTorch runs
eagerly in inference mode, in fp32 beside both kinds of weights. Ratios are ONNX Runtime's time over PyTorch's. Not
measured on a GPU."""
WALL = f' Wall time is of {THREADS} threads: the fastest of as many passes.'
ACCURACY_NOTES = """\
ONNX Runtime on one thread, in batches of {batch} validation images of each run, fp32 and int8 in turn. int8 is of
linear layers; state-space parameters, the projections to dt, B and C, convolutions and norms are fp32. CPU time is that
of the process, per image."""


def measure(name: str, repeats: int, wall: bool, folder: Path) -> List[Dict[str, Any]]:
    """Rows of an untrained model, one for each kind of weights."""
    model = weights.load_model(weights.Spec(name, 'untrained'), argparse.Namespace(model_args={}, seed=0))
    channels, *_ = resolve_data_config(pretrained_cfg=model.pretrained_cfg)['input_size']
    x = torch.randn(1, channels, *[weights.own_size(model)] * 2)
    files = export(name, model, x, folder)
    times = {'CPU': milliseconds(model, x, folder, 1, time.process_time, repeats).median()}
    if wall:
        times['wall'] = milliseconds(model, x, folder, THREADS, time.perf_counter, repeats).min()
    rows = []
    for kind, file in files.items():
        row = {'model': f'`{name}`', 'weights': kind, 'nodes': file.nodes, 'MiB': file.size / MIB}
        row |= {'size over weights': file.size / file.weights, 'load, s': file.load_s}
        for clock, found in times.items():
            row |= {f'{clock} ms, PyTorch': found['PyTorch'], f'{clock} ms, ONNX Runtime': found[kind]}
            row[f'{clock} ratio'] = found[kind] / found['PyTorch']
        rows.append(row)
    return rows


def export(name: str, model: nn.Module, x: Tensor, folder: Path, dynamic_batch: bool = False) -> Dict[str, OnnxFile]:
    """Writes fp32.onnx and int8.onnx.

    Raises:
        UserError: If the model cannot be exported.
    """
    with as_user_error(name, ValueError):
        return {
            kind: export_onnx(model, x, folder / f'{kind}.onnx', dynamic_batch, int8=kind == 'int8') for kind in WEIGHTS
        }


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@torch.inference_mode()
def milliseconds(
    model: nn.Module, x: Tensor, folder: Path, threads: int, clock: Callable[[], float], repeats: int
) -> pd.DataFrame:
    """Times of passes of PyTorch and of each file, which take turns, without the first."""
    inputs = {'images': x.numpy()}
    runs = {kind: partial(session(folder / f'{kind}.onnx', threads).run, None, inputs) for kind in WEIGHTS}
    runs['PyTorch'] = partial(model, x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = [{name: elapsed(run, clock) for name, run in runs.items()} for _ in range(1 + repeats)]
    finally:
        torch.set_num_threads(before)
    return 1e3 * pd.DataFrame(times[1:])


def elapsed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def accuracy(run: Path, folder: Path) -> List[Dict[str, Any]]:
    """Rows of a folder of `vmamba train`, one for each kind of weights."""
    config = load_config(run / 'config.yaml', {})
    with as_user_error(str(run), RuntimeError, ValueError):
        model = vmamba.load(run / 'best.pt')
    images = Images(load_datasets(config)[1], resolve_data_config(model=model), BATCH, 0, CPU, config.skip_bad_images)
    batches = [(x.numpy(), labels.numpy()) for _, x, labels in images]
    files = export(str(run), model, torch.from_numpy(batches[0][0][:1]), folder, dynamic_batch=True)
    networks = {kind: session(folder / f'{kind}.onnx', 1) for kind in files}
    passes = [{'weights': kind, **classify(networks[kind], *batch)} for batch in batches for kind in networks]
    sums = pd.DataFrame(passes).groupby('weights').sum()
    facts = {'model': f'`{config.model}`', 'data': config.data, 'epochs': config.epochs, 'images': len(images)}
    return [
        {
            **facts,
            'weights': kind,
            'top-1': 100 * sums.right[kind] / len(images),
            'MiB': file.size / MIB,
            'CPU ms per image': 1e3 * sums.seconds[kind] / len(images),
        }
        for kind, file in files.items()
    ]


def classify(network: onnxruntime.InferenceSession, x: np.ndarray, labels: np.ndarray) -> Dict[str, float]:
    """How many of the images [B, C, H, W] get the right one of the labels [B], and the seconds of CPU time."""
    start = time.process_time()
    (logits,) = network.run(None, {'images': x})
    return {'seconds': time.process_time() - start, 'right': (logits.argmax(axis=1) == labels).sum()}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--models', nargs='+', default=MODELS, help='models of this library; default: one of a family')
    parser.add_argument('--runs', nargs='+', type=Path, help='folders of `vmamba train`, to measure accuracies')
    parser.add_argument('--repeats', type=positive, default=6, help='passes of PyTorch and of each file')
    parser.add_argument('--wall', action='store_true', help='time two threads, too, on a machine without other work')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table')
    return parser.parse_args(argv)


@one_line_errors('bench_export.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    rows: List[Dict[str, Any]] = []
    for item in track(args.runs or args.models, 'Measuring'):
        with tempfile.TemporaryDirectory() as folder:
            rows += accuracy(item, Path(folder)) if args.runs else measure(item, args.repeats, args.wall, Path(folder))
    load, *_ = psutil.getloadavg()
    facts = facts_of(CPU, 'bench export', argv)
    facts['machine'] = f'{facts["machine"].rpartition(",")[0]}, {psutil.cpu_count()} cores, load average {load:.1f}'
    facts['versions'] += f', onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}'
    name, title, notes = 'bench_export', 'Exported models', NOTES.format(repeats=args.repeats, wall=WALL * args.wall)
    if args.runs:
        name, title, notes = f'{name} accuracy', 'Accuracy with int8 weights', ACCURACY_NOTES.format(batch=BATCH)
    Report(name, title, facts, [pd.DataFrame(rows)], textwrap.fill(notes, 120)).publish(open_console(200), args.docs)


if __name__ == '__main__':
    main()
