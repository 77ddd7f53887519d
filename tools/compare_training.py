"""Trains models from scratch by one recipe, and compares accuracy, also at other sizes, speed, memory and state.

Each model gets the best of several learning rates, which one seed chooses on a part of the training images. A run that
fails is a result, not an error; an interrupt reports what is done, and --resume continues.

    vmamba compare training --device cuda --jobs 15 --docs docs/benchmarks.md
    vmamba compare training --models vmamba_nano vit resnet18 --rates 1e-3 --seeds 0 1 --epochs 10
"""

import argparse
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.report import Report
from vmamba.tools.benchmarks.timing import median_ms, peak_mib, settled_memory
from vmamba.tools.benchmarks.trainings import RESULT, SCRIPT, Comparison, Row, add_run_options, epochs_of, spread
from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.output_files import lock_folder, write_text
from vmamba.tools.terminal import number
from vmamba.tools.training.config import Config, load_config
from vmamba.tools.training.setup import create_model
from vmamba.tools.training.splits import class_names, load_datasets
from vmamba.tools.user_errors import Parser, UserError, changes, nearest, one_line_errors, positive_float

RECIPE = FOLDER / 'classification' / 'compare.yaml'
VALIDATE = SCRIPT.with_name('validate.py')
SETTINGS = 'settings.yaml'  # of all runs, in their folder
OWN_KEYS = ('model', 'model_args', 'lr', 'train_split', 'val_split', 'seed', 'device', 'output')  # which are set here
SPLITS = {'search': ('search', 'search_validation'), 'whole': ('train', 'validation')}
SHARES = {f'at {share} %': share / 100 for share in (50, 75, 90)}  # of the epochs
SIZES = {f'{size}x{size}': size for size in (64, 96, 128, 192)}
BATCH = {'cuda': 1024, 'cpu': 8}  # for speed and memory
REPEATS = 20
COLUMNS = ('model', 'part', 'lr', 'seed', 'status', 'epochs', 'accuracy')
NOTES = """\
Each model is trained from scratch by `configs/classification/compare.yaml`: {epochs} epochs of AdamW with batches of
{batch_size} and images of {img_size}x{img_size} in {precision}. Only the learning rate is each model's own: the best of
{rates} with seed {seed} on a third of the training images, by the accuracy on another sixth of them (part
`search`). Accuracy is in percent, on the validation images after the last epoch, not after the best one; ± is the
standard deviation over the seeds, which decide the weights, the order and the augmentation. Mean accuracies after
shares of the epochs show how flat the curves are. All runs are listed, also those that failed. `packaged/clutter` has
6,000 digits of random size, place and colour over photographs for training, and 1,500 of other digits over other
photographs for validation.

Speed and memory are those of one model alone, eager in bf16 with {batch} random images: forward, or forward and
backward. Peaks are those of PyTorch's allocator, weights and images included. The state is what all mixers keep of an
image of 64x64, in numbers: states of scans and convolutions, or keys and values. Accuracy by size is that of the same
weights on the same images, enlarged (`--img-size` of `vmamba validate`): position embeddings are resized, and the
windows of Swin grow with the image.

`vim_*` are one Vim block with different mixers, and as many blocks as make about the same parameters. `swin` and
`convnext` have the stages, strides and channels of `vmamba_nano`; `vit` has the step between tokens of `vim_*`, 4
pixels (256 tokens, and 225 of overlapping patches). The windows of MambaVision cover its maps, as at 224x224."""


class Peer(NamedTuple):
    """A model of timm, the numbers that its mixers keep of an image of 64x64, and its arguments."""

    name: str
    state: Optional[int] = None
    args: Dict[str, Any] = {}


# Chosen without looking at accuracies. The peers have as many blocks as make about the parameters of VMamba-nano
# (Swin's in pairs, which shift windows), the ViT those of Vim-nano. The state of scans is blocks * directions *
# channels * states, that of attention blocks * 2 * tokens * channels.
MODELS = {
    'vim_s4d': Peer('vim_nano', 5 * 2 * 256 * 64, dict(mixer='s4d', d_state=64, depth=5)),
    'vim_h3': Peer('vim_nano', 3 * 2 * 256 * (32 + 32), dict(mixer='h3', d_state=32, depth=3)),  # shift and diagonal
    'vim_mamba': Peer('vim_nano', 4 * 2 * 256 * 16, dict(mixer='mamba', d_state=16)),
    'vim_mamba2': Peer('vim_nano', 4 * 2 * 256 * 64, dict(mixer='mamba2', d_state=64)),
    'vim_attention': Peer('vim_nano', 4 * 2 * 226 * 256, dict(mixer='attention')),
    'vmamba_nano': Peer('vmamba_nano', 4 * (64 + 128 + 2 * 256 + 512)),
    'vssd_nano': Peer('vssd_nano', (64 + 128 + 2 * 256) * 16 + 2 * 4 * 256),
    'mambavision_nano': Peer('mambavision_nano', 192 * 8 + 2 * (16 * 128 + 4 * 256), dict(window_size=(4, 2))),
    'adventurer_nano': Peer('adventurer_nano', 4 * 256 * 16),
    'vit': Peer('deit_tiny_patch16_224', 5 * 2 * 257 * 128, dict(patch_size=4, embed_dim=128, depth=5, num_heads=4)),
    'swin': Peer(
        'swin_tiny_patch4_window7_224',
        2 * (2 * 256 * 32 + 2 * 64 * 64 + 4 * 16 * 128 + 4 * 256),
        dict(window_size=4, embed_dim=32, depths=(2, 2, 4, 1), num_heads=(1, 2, 4, 8)),
    ),
    'convnext': Peer('convnext_atto', 0, dict(depths=(2, 2, 3, 2), dims=(32, 64, 128, 256))),
}


class Run(NamedTuple):
    """What is trained: a model by its name in the tables, on which part of the data, a learning rate and a seed."""

    model: str
    part: str
    lr: float
    seed: int


class TrainingComparison(Comparison):
    """The search for each model's learning rate, and the runs at the best one."""

    name, kind, columns, own = 'compare training', Run, COLUMNS, OWN_KEYS

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        super().__init__(args, argv)
        for model in args.models:
            if model not in MODELS and not timm.is_model(model):
                raise UserError(f'there is no model {model!r}{nearest(model, {*MODELS, *timm.list_models()})}')
        for name in ('models', 'rates', 'seeds'):
            if len(set(getattr(args, name))) < len(getattr(args, name)):
                raise UserError(f'--{name} names something twice')
        self.total = len(args.models) * (len(args.rates) * (len(args.rates) > 1) + len(args.seeds))
        self.recipe = load_config(RECIPE, self.keys)

    def runs(self) -> List[Run]:
        """The search, and of each model whose search is among the rows the runs at its rate, one seed after another."""
        args = self.args
        search = product(args.rates if len(args.rates) > 1 else (), args.models)
        rates = {model: self.best_rate(model) for model in args.models}
        whole = product(args.seeds, [model for model in args.models if rates[model]])
        runs = [Run(model, 'search', lr, args.seeds[0]) for lr, model in search]
        return runs + [Run(model, 'whole', rates[model], seed) for seed, model in whole]

    def best_rate(self, model: str) -> Optional[float]:
        """The rate of the most accurate run of a search, or the lowest of equals; None before its end."""
        rates = self.args.rates
        if len(rates) == 1:
            return rates[0]
        found = [row for row in self.rows if (row['model'], row['part']) == (model, 'search')]
        done = [row for row in found if row['accuracy'] is not None and len(found) == len(rates)]
        return max(done, key=lambda row: (row['accuracy'], -row['lr']))['lr'] if done else None

    def config(self, run: Run) -> Dict[str, Any]:
        """The recipe with what is the run's own."""
        peer = peer_of(run.model)
        own = dict(model=peer.name, model_args=peer.args, lr=run.lr, seed=run.seed, device=self.args.device.type)
        own.update(zip(('train_split', 'val_split'), SPLITS[run.part]))
        return {**vars(self.recipe), **own}

    def evaluate(self, run: Run, folder: Path, ended: bool) -> Tuple[Row, str]:
        """Accuracies after shares of the epochs, and at all sizes."""
        done, sizes, message = epochs_of(folder).val_top1.tolist() if ended else [], {}, ''
        if done and run.part == 'whole':
            images = self.args.output / 'images', '--checkpoint', max(folder.glob('checkpoint-*.pt')), '--workers', 0
            how = '--precision', self.recipe.precision, '--device', self.args.device.type
            command = VALIDATE, *images, *how, '--img-size', *SIZES.values(), '--output', folder
            _, message = self.call(command, folder / 'validate.txt')
            if (folder / 'validate.csv').is_file():  # without the sizes that a model does not take
                sizes = pd.read_csv(folder / 'validate.csv').set_index('img_size').top1.to_dict()
        shares = {key: done[math.ceil(share * len(done)) - 1] if done else None for key, share in SHARES.items()}
        accuracies = {'accuracy': done[-1] if done else None, **shares}
        return {**accuracies, **{key: sizes.get(size) for key, size in SIZES.items()}}, message

    def resume(self) -> None:
        """Takes the rows of the runs that an interrupted comparison in the same folder has completed, with --resume.

        Raises:
            UserError: If there is one without --resume, or it had other settings.
        """
        output, settings = self.args.output, {k: v for k, v in vars(self.recipe).items() if k not in OWN_KEYS}
        record = output / SETTINGS
        if record.is_file() and not self.args.resume:
            raise UserError(f'{output} holds such runs already; give --resume, or choose another --output')
        if record.is_file() and (differences := changes(yaml.safe_load(record.read_text()), settings)):
            raise UserError(f'{output} has runs with {differences}; choose another --output')
        write_text(record, yaml.safe_dump(settings))
        for _ in SPLITS:  # first the search, which decides on the other runs
            results = [self.folder(run) / RESULT for run in self.runs()]
            self.rows = [json.loads(path.read_text()) for path in results if path.is_file()]

    def publish(self, complete: bool) -> None:
        """Measures the models that were trained, if all runs have ended, and writes the picture and the report."""
        args, recipe = self.args, self.recipe
        self.rows.sort(key=lambda row: (args.models.index(row['model']), *self.run_of(row)))
        trained = dict.fromkeys(row['model'] for row in self.rows if complete and row['status'] == 'ok')
        speeds = {model: speed(model, recipe, args.device) for model in trained}
        runs = [self.run_of(row) for row in self.rows]
        shown = [run for run in runs if run.part == 'whole'] or runs
        curves = [epochs_of(self.folder(run)).assign(model=run.model) for run in shown]
        picture = args.output / 'training.png'
        plot_accuracies(pd.concat(curves), recipe.data, picture)
        self.console.print(f'Wrote {args.output / "training.csv"} and {picture}')
        facts = {**self.facts, 'runs done': f'{len(self.rows)} of {self.total}'}
        choice = dict(rates=', '.join(map(str, args.rates)), seed=args.seeds[0], batch=BATCH[args.device.type])
        notes, names = NOTES.format(**{**vars(recipe), **choice}), ('compare_training', 'Training from scratch')
        found = tables(self.rows, speeds)
        report = Report(*names, facts, found, notes, self.messages(self.rows), picture.name)
        report.publish(self.console, args.docs, picture)


def peer_of(model: str) -> Peer:
    return MODELS.get(model, Peer(model))


def write_images(dataset: Dataset, folder: Path) -> None:
    """Writes images as files by class, which validate.py reads."""
    folders = [folder / name for name in class_names(dataset)]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    for i in range(len(dataset)):
        image, label = dataset[i]
        image.save(folders[label] / f'{i:05d}.png')


def speed(model: str, config: Config, device: torch.device) -> Row:
    """Parameters, and images per second and peak memory of inference and of training."""
    held, peer, batch = settled_memory(device), peer_of(model), BATCH[device.type]
    built = create_model(replace(config, model=peer.name, model_args=peer.args), num_classes=10).to(device)
    images = torch.randn(batch, 3, config.img_size, config.img_size, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return built(images)

    found = {'parameters, M': sum(parameter.numel() for parameter in built.parameters()) / 1e6}
    with suppress(torch.OutOfMemoryError):
        for key, run in (('inference', torch.no_grad()(forward)), ('training', lambda: forward().sum().backward())):
            built.train(key == 'training')
            found[f'{key}, images/s'] = 1e3 * batch / median_ms(run, device, REPEATS)
            found[f'{key}, peak MiB'] = peak_mib(run, device, held)
    return found


def tables(rows: Sequence[Row], speeds: Dict[str, Row]) -> List[pd.DataFrame]:
    """The models, their accuracies by size, and all runs."""
    frame = pd.DataFrame(rows).astype(dict.fromkeys(('accuracy', *SHARES, *SIZES), float))
    models, sizes = [], []
    for model, own in frame[frame.part == 'whole'].groupby('model', sort=False):
        models.append(
            {
                'model': model,
                'built as': built_as(model),
                'learning rate': own.lr.iloc[0],
                'accuracy': spread(own.accuracy),
                ' / '.join(SHARES): ' / '.join(number(own[key].mean(), '.2f') for key in SHARES),
                **speeds.get(model, {}),
                'state': peer_of(model).state,
            }
        )
        sizes.append({'model': model, **{key: spread(own[key]) for key in SIZES}})
    return [pd.DataFrame(found) for found in (models, sizes) if found] + [frame[list(COLUMNS)]]


def built_as(model: str) -> str:
    peer = peer_of(model)
    args = ', '.join(f'{name}={value}' for name, value in peer.args.items())
    return f'`{peer.name}({args})`' if args else f'`{peer.name}`'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage='%(prog)s [--MODELS NAME ...] [--KEY VALUE ...]')
    parser.add_argument(
        '--models', nargs='+', default=list(MODELS), help=f'{", ".join(MODELS)} (all by default), or any of timm'
    )
    rates = dict(nargs='+', type=positive_float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument('--rates', **rates, help='learning rates to choose from; without search if it is one')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='the search takes the first one')
    add_run_options(parser, 'runs/compare', OWN_KEYS)
    return parser.parse_args(argv)


@one_line_errors('compare_training.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    comparison = TrainingComparison(parse_args(argv), argv)
    output, (_, validation) = comparison.args.output, load_datasets(comparison.recipe)
    with lock_folder(output):
        comparison.resume()
        write_images(validation, output / 'images')
        complete = comparison.train_all('training.csv', comparison.total)
        if comparison.rows:
            comparison.publish(complete)


if __name__ == '__main__':
    main()
