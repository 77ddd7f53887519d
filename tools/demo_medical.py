"""Segments nuclei with U-Mamba, with the same network without Mamba and with nnU-Net's residual encoder U-Net.

The data are a fluorescence image of 125 nuclei and a volume of 51, which the package stardist ships. Each quadrant is
held out once: the networks learn from the others, at a distance. Dice and F1 of nuclei at an IoU of 0.5 are those of
all held-out quadrants together. Writes scores.csv and pictures. One image each shows that the networks learn, and does
not rank them.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import pandas as pd
import torch

from vmamba.tools.devices import add_device_option
from vmamba.tools.figures.plots import draw_case
from vmamba.tools.output_files import write_csv
from vmamba.tools.segmentation.config import Config
from vmamba.tools.segmentation.data import Patches, find_cases, whole_cases
from vmamba.tools.segmentation.engine import Engine
from vmamba.tools.segmentation.nuclei import (
    Nuclei,
    count_matches,
    dice,
    folder_of_stardist,
    instances_of,
    quadrant,
    read_nuclei,
    write_fold,
)
from vmamba.tools.segmentation.peers import residual_encoder_unet
from vmamba.tools.segmentation.run import create_network
from vmamba.tools.terminal import open_console, table_of
from vmamba.tools.training.seeding import seed_all
from vmamba.tools.user_errors import Parser, one_line_errors, positive

from rich.progress import track

NETWORKS = {
    'U-Mamba Bot': dict(kind='bot'),
    'U-Mamba Enc': dict(kind='enc'),
    'without Mamba': dict(kind='enc', mixer='none'),
    'ResidualEncoderUNet': dict(kind='bot', mixer='none'),  # only the sizes are read
}
FOLDS = range(4)
MARGINS = {'2d': 40, '3d': 6}  # the largest nucleus of the image; a few voxels of the volume, which has no more
# Sizes by rank and device.
SIZES = {
    ('2d', 'cpu'): dict(patch_size=[64, 64], features=[8, 16, 32, 64], batch_size=4, iterations=120),
    ('3d', 'cpu'): dict(patch_size=[16, 16, 16], features=[8, 16, 32], batch_size=2, iterations=100),
    ('2d', 'cuda'): dict(patch_size=[128, 128], features=[32, 64, 128, 256, 512], batch_size=8, iterations=300),
    ('3d', 'cuda'): dict(patch_size=[24, 24, 24], features=[32, 64, 128, 256], batch_size=4, iterations=300),
}
COMMON = dict(num_classes=3, foreground=0.8, workers=0, epochs=2, lr=0.05, momentum=0.9, log=[], val_data='', output='')


class Job(NamedTuple):
    """A training of a network on three quadrants of an image, and its test on the fourth."""

    rank: str
    network: str
    fold: int
    seed: int
    device: str
    data: Path

    def config(self) -> Config:
        sizes = dict(SIZES[self.rank, self.device])
        sizes['iterations'] = max(sizes['iterations'] // COMMON['epochs'], 1)
        data = str(self.data / self.rank / str(self.fold) / 'train')
        config = Config(**{**COMMON, **sizes, **NETWORKS[self.network], 'data': data, 'seed': self.seed})
        config.precision = 'fp32' if self.device == 'cpu' else 'bf16'
        config.settle()
        return config


def run(job: Job) -> Dict[str, Any]:
    """Trains and predicts; returns the job with the labels of the held-out quadrant, parameters and seconds."""
    start, config = time.perf_counter(), job.config()
    device, ndim = torch.device(job.device), len(config.patch_size)
    if job.device == 'cpu':
        torch.set_num_threads(1)
    seed_all(config.seed)
    if job.network == 'ResidualEncoderUNet':
        sizes = config.features, config.kernel_sizes, config.strides
        network = residual_encoder_unet(config.in_chans, config.num_classes, *sizes, True, ndim)
    else:
        network = create_network(config)
    engine = Engine(config, network, Patches(config, find_cases(Path(config.data), ndim)), device)
    for epoch in range(config.epochs):
        engine.train_epoch(epoch)
    (case,) = whole_cases(config, find_cases(Path(config.data).with_name('test'), ndim))
    predicted = engine.predict(case['image'].as_tensor())[0, 0].cpu().numpy()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    found = dict(predicted=predicted.astype(np.uint8), parameters=parameters, seconds=time.perf_counter() - start)
    return {**job._asdict(), **found}


def run_all(jobs: Sequence[Job], processes: int) -> List[Dict[str, Any]]:
    """Runs the jobs, several at a time."""
    if processes == 1:
        return [run(job) for job in track(jobs, 'Training')]
    with ProcessPoolExecutor(processes, mp_context=get_context('spawn')) as pool:
        return list(track(pool.map(run, jobs), 'Training', total=len(jobs)))


def score(results: pd.DataFrame, nuclei: Dict[str, Nuclei], output: Path) -> List[Dict[str, Any]]:
    """Scores of each network and seed on all held-out quadrants together; draws those of the first seed."""
    rows = []
    for (rank, network, seed), own in results.groupby(['rank', 'network', 'seed'], sort=False):
        image, instances = nuclei[rank]
        whole = np.zeros(image.shape, np.uint8)
        for fold, predicted in zip(own.fold, own.predicted):
            whole[quadrant(whole.shape, fold)] = predicted
        hits, wrong, missed = count_matches(instances_of(whole), instances)
        scores = dict(dice=dice(whole, instances), f1=2 * hits / max(2 * hits + wrong + missed, 1))
        facts = dict(data=rank, network=network, seed=seed, parameters=own.parameters.iloc[0])
        rows.append({**facts, **scores, 'seconds': round(own.seconds.sum(), 1)})
        if seed == results.seed.iloc[0]:
            title = f'{network}, held-out quadrants: Dice {scores["dice"]:.3f}, F1 {scores["f1"]:.3f}'
            masks = (instances > 0).astype(np.uint8), (whole > 0).astype(np.uint8)
            picture = output / f'{rank}_{network.lower().replace(" ", "-")}.png'
            draw_case(image[None].astype(np.float32), *masks, title, picture)
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, and the standard deviations of the scores."""
    groups = rows.groupby(['data', 'network'], sort=False)
    table = groups.agg(parameters=('parameters', 'first'), seconds=('seconds', 'mean')).reset_index()
    for key, name in (('dice', 'Dice'), ('f1', 'F1')):
        found = groups[key].agg(['mean', 'std']).reset_index()
        table[name] = [f'{mean:.3f} ± {std:.3f}' for mean, std in zip(found['mean'], found['std'].fillna(0))]
    return table


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--output', type=Path, default=Path('demo-medical'), help='folder of the results')
    parser.add_argument('--images', type=Path, help='folder with img2d.tif and the others; default: that of stardist')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--data', nargs='+', choices=('2d', '3d'), default=('2d', '3d'))
    parser.add_argument('--networks', nargs='+', choices=tuple(NETWORKS), default=tuple(NETWORKS), metavar='NAME')
    parser.add_argument('--processes', type=positive, help='trainings at a time; default: 1 per core, 4 on a GPU')
    add_device_option(parser)
    return parser.parse_args(argv)


@one_line_errors('demo_medical.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args, start = parse_args(argv), time.perf_counter()
    images, data = args.images or folder_of_stardist(), args.output / 'data'
    nuclei = {rank: read_nuclei(images, rank) for rank in args.data}
    for rank, fold in product(args.data, FOLDS):
        write_fold(nuclei[rank], fold, MARGINS[rank], data / rank / str(fold))
    runs = product(args.data, args.networks, args.seeds, FOLDS)
    jobs = [Job(rank, network, fold, seed, args.device.type, data) for rank, network, seed, fold in runs]
    default = 4 if args.device.type == 'cuda' else os.cpu_count() or 1
    rows = score(pd.DataFrame(run_all(jobs, args.processes or default)), nuclei, args.output)
    write_csv(args.output / 'scores.csv', rows)
    console = open_console()
    console.print(table_of(summary(pd.DataFrame(rows)), f'Held-out quadrants, mean ± std of {len(args.seeds)} seeds'))
    console.print('One image each: the table shows that the networks learn, and does not rank them.')
    console.print(f'Done in {time.perf_counter() - start:.0f} s; results are in {args.output}/')


if __name__ == '__main__':
    main()
