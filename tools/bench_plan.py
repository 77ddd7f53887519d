"""What training and feature extraction take on many GPUs, computed from the measured rates of one.

Hours, images and bytes per second from the storage, bytes of the all-reduce against the bandwidth of the network, and
memory with and without shards. Only the rate at which a core reads images is measured by this command.

vmamba bench plan --docs docs/scaling.md
"""

import argparse
import functools
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import pandas as pd
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.flop_counter import FlopCounterMode

import vmamba  # noqa: F401
from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.report import Report
from vmamba.tools.devices import device_name
from vmamba.tools.images.batches import eval_transform
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import load_config
from vmamba.tools.training.data import create_train_transform
from vmamba.tools.training.parallel import blocks_of
from vmamba.tools.user_errors import Parser, one_line_errors

from skimage import data

# Images per second of one H200 in bf16 in a CUDA graph, as docs/kernels_log.md has them: forward and backward with 64
# images, and inference with 128.
TRAINING = {'vmamba_t': 3283, 'vssd_t': 2140, 'mambavision_t': 4689}
INFERENCE = {'vmamba_t': 12499, 'vssd_t': 12619, 'mambavision_t': 20228, 'vim2_t': 18828}
SMALLER = {'vmamba_b': 'vmamba_t', 'vssd_b': 'vssd_t'}  # from whose rate that of a model is computed
EAGER_MS = 30.9  # of vmamba_t's forward and backward pass in docs/benchmarks.md, where the host is the limit
TRAINED = ('vmamba_t', 'vmamba_b', 'vssd_b')
STORED = (*TRAINED, 'adventurer_l', 'mambavision_l3')
DATA = {'1K': (1_281_167, 300), '22K': (14_197_122, 90)}  # images and epochs
IMAGE_BYTES = 147_897_477_120 / 1_281_167  # the published archive of ImageNet-1K's training images
RECIPE = 1024  # images per step
PER_GPU = 128
PER_HOST = 8
GPUS = (8, 64, 512)
NVLINK = 450e9  # bytes per second and direction of a GPU
NETWORKS = {'8 x 400 Gb/s': 400e9, '100 Gb/s': 12.5e9}  # bytes per second of a host
MEMORY = 141e9
STATE_BYTES = 20  # per parameter: weight, gradient, two moments, moving average
BACKWARD = 2 / 3  # of the time of forward and backward
RATES_NOTES = """\
Measured: images per second of one NVIDIA H200, from [the log of the kernels](kernels_log.md): bf16, replays of a CUDA
graph, forward and backward with 64 images, inference with 128. Computed: the rate of the smaller model of the family,
times the ratio of their FLOPs. A larger model has larger products, which are more efficient, so it may be faster than
that. The optimizer is not included. Eager mode reaches the rates where the GPU is slower than the host, from about
{images:.0f} images of VMamba-T (an eager step takes {eager} ms, measured)."""
TRAINING_NOTES = """\
Computed, for {per_gpu} images per GPU, without losses between GPUs (the next table says when that holds): 300 epochs of
ImageNet-1K (1,281,167 images) and 90 of ImageNet-22K (14,197,122). Storage: {kb:.0f} kB per image, as published for
ImageNet-1K. Cores: {train:.0f} images/s of a core, measured on this machine, {machine}, with a JPEG file of 500x375
pixels and the recipe's RandAugment. The last column keeps the recipe's {recipe} images per step, and takes the longer
of the GPU's time and the host's: {eager} ms for VMamba-T's blocks (measured), in proportion for more blocks.

All-reduce: DDP sends 2 (n - 1) / n times the fp32 gradients, first in a host of {host} GPUs by NVLink (450 GB/s per
direction), then between hosts, each sharing its network; these bandwidths are published ones. DDP hides it behind the
backward pass, two thirds of the step: "from" is the number of images per GPU from which it can. With fewer, the GPUs
wait for the network.

Memory: {state} bytes per parameter for weight, gradient, two moments and moving average in fp32, without activations.
FSDP2 (`--shard`) divides them among the GPUs, and sends half as much again, because it gathers the weights twice."""
FEATURES_NOTES = """\
Computed, for a billion images of {kb:.0f} kB at 224x224, from the rates above. Storage and cores are for a host of
{host} GPUs; cores at {read:.0f} images/s of one, measured as above, for reading, resizing and cropping. The output is
pooled vectors in fp16."""


class Facts(NamedTuple):
    """Of a model: parameters, FLOPs of an image, blocks, and width of its pooled features."""

    params: int
    flops: int
    blocks: int
    width: int


@functools.cache
def facts_of(name: str) -> Facts:
    model = timm.create_model(name, device='meta').eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Facts(params, counter.get_total_flops(), len(blocks_of(model)), model.num_features)


def rate_of(name: str, measured: Dict[str, int]) -> float:
    """Images per second of one GPU."""
    if name in measured:
        return measured[name]
    smaller = SMALLER[name]
    return measured[smaller] * facts_of(smaller).flops / facts_of(name).flops


def source_of(name: str, measured: Dict[str, int]) -> str:
    return 'measured' if name in measured else f'computed from `{SMALLER[name]}`'


def rates() -> pd.DataFrame:
    rows = []
    for name in (*INFERENCE, *SMALLER):
        facts = facts_of(name)
        row = {'model': f'`{name}`', 'parameters, M': facts.params / 1e6, 'GFLOPs, multiply-adds': facts.flops / 2e9}
        for title, measured in (('training', TRAINING), ('inference', INFERENCE)):
            known = name in {**measured, **SMALLER}
            row[f'{title}, images/s'] = round(rate_of(name, measured)) if known else None
            row[f'{title} is'] = source_of(name, measured) if known else '-'
        rows.append(row)
    return pd.DataFrame(rows).astype({'training, images/s': 'Int64'})


def training(per_core: float) -> pd.DataFrame:
    """Time and data of whole trainings."""
    rows = []
    for name in TRAINED:
        rate, host = rate_of(name, TRAINING), EAGER_MS / 1e3 * facts_of(name).blocks / facts_of('vmamba_t').blocks
        for gpus in GPUS:
            total = gpus * rate
            row = {'model': f'`{name}`', 'GPUs': gpus, 'images per step': gpus * PER_GPU, 'images/s': round(total)}
            row |= {'storage, GB/s': total * IMAGE_BYTES / 1e9, 'cores': round(total / per_core)}
            row |= {f'hours, {key}': images * epochs / total / 3600 for key, (images, epochs) in DATA.items()}
            images, epochs = DATA['1K']
            step = max(RECIPE / total, host)
            row[f'hours, 1K, {RECIPE} per step'] = images * epochs / RECIPE * step / 3600
            rows.append(row)
    return pd.DataFrame(rows)


def communication() -> pd.DataFrame:
    """The all-reduce of a step."""
    rows = []
    for name in TRAINED:
        rate, size = rate_of(name, TRAINING), 4 * facts_of(name).params
        for gpus in GPUS:
            hosts = gpus // PER_HOST
            inside = sent(size, PER_HOST) / NVLINK
            row = {
                'model': f'`{name}`',
                'GPUs': gpus,
                'gradients, MB': size / 1e6,
                'sent per GPU, MB': sent(size, gpus) / 1e6,
            }
            row |= {'backward, ms': 1e3 * BACKWARD * PER_GPU / rate, 'NVLink, ms': 1e3 * inside}
            row['NVLink, from'] = fewest(inside, rate)
            for network, bandwidth in NETWORKS.items():
                seconds = inside + sent(size, hosts) / bandwidth if hosts > 1 else None
                row[f'{network}, ms'] = seconds and 1e3 * seconds
                row[f'{network}, from'] = seconds and fewest(seconds, rate)
            rows.append(row)
    return pd.DataFrame(rows).astype({f'{network}, from': 'Int64' for network in NETWORKS})


def sent(size: float, places: int) -> float:
    """Bytes that each of several places sends in an all-reduce."""
    return 2 * (places - 1) / places * size


def fewest(seconds: float, rate: float) -> int:
    """Images per GPU whose backward pass takes so long."""
    return -int(-seconds * rate // BACKWARD)


def memory() -> pd.DataFrame:
    """What weights and optimizer take on a GPU, and what is sent, without and with shards."""
    rows = []
    for name in STORED:
        params = facts_of(name).params
        row = {'model': f'`{name}`', 'parameters, M': params / 1e6, 'DDP, GB': STATE_BYTES * params / 1e9}
        row['of 141 GB, %'] = 100 * STATE_BYTES * params / MEMORY
        row |= {f'FSDP2, {gpus} GPUs, GB': STATE_BYTES * params / gpus / 1e9 for gpus in GPUS[:2]}
        row |= {'sent by DDP, MB': sent(4 * params, 8) / 1e6, 'sent by FSDP2, MB': 1.5 * sent(4 * params, 8) / 1e6}
        rows.append(row)
    return pd.DataFrame(rows)


def features(per_core: float) -> pd.DataFrame:
    rows = []
    for name in (*INFERENCE, *SMALLER):
        rate, images = rate_of(name, INFERENCE), 1e9
        row = {'model': f'`{name}`', 'images/s of a GPU': round(rate), 'is': source_of(name, INFERENCE)}
        row |= {f'hours, {gpus} GPUs': images / rate / gpus / 3600 for gpus in GPUS}
        row |= {'storage, GB/s': PER_HOST * rate * IMAGE_BYTES / 1e9, 'cores': round(PER_HOST * rate / per_core)}
        rows.append({**row, 'output, TB': 2 * images * facts_of(name).width / 1e12})
    return pd.DataFrame(rows)


def read_rate(transform: Callable[[Image.Image], Any], images: int = 40) -> float:
    """Images per second that one core decodes and transforms, by its CPU time."""
    file = io.BytesIO()
    Image.fromarray(data.astronaut()).resize((500, 375)).save(file, 'jpeg', quality=95)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    for _ in range(images):
        transform(Image.open(io.BytesIO(file.getvalue())).convert('RGB'))
    torch.set_num_threads(threads)
    return images / (time.process_time() - start)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables')
    return parser.parse_args(argv)


@one_line_errors('bench_plan.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, console = parse_args(argv), open_console(200)
    config = load_config(FOLDER / 'classification/vmamba_t.yaml', {})
    own = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg('vmamba_t').to_dict())
    train, read = read_rate(create_train_transform(config, own)), read_rate(eval_transform(own))
    machine = device_name(torch.device('cpu')).rpartition(',')[0]
    eager = TRAINING['vmamba_t'] * EAGER_MS / 1e3
    known = dict(per_gpu=PER_GPU, kb=IMAGE_BYTES / 1e3, train=train, read=read, machine=machine, recipe=RECIPE)
    known |= dict(eager=EAGER_MS, host=PER_HOST, state=STATE_BYTES, images=eager)
    sections: List[tuple] = [
        ('rates', 'Rates of one GPU', RATES_NOTES, [rates()]),
        ('training', 'Training', TRAINING_NOTES, [training(train), communication(), memory()]),
        ('features', 'Features of a billion images', FEATURES_NOTES, [features(read)]),
    ]
    for name, title, notes, tables in sections:
        facts = {'command': shlex.join(['vmamba', 'bench', 'plan', *argv])}
        Report(f'bench_plan {name}', title, facts, tables, notes.format(**known)).publish(console, args.docs)


if __name__ == '__main__':
    main()
