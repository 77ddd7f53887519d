"""Top-1 and top-5 accuracy of models on folders of images, also at other resolutions.

Each model preprocesses as its own configuration says. Writes validate.csv, and validate.png for several resolutions.

    vmamba validate imagenet/val --models vmamba_t vim_s=vim_s_midclstok_80p5acc.pth
    vmamba validate pets/val --checkpoint runs/finetune/best.pt
    vmamba validate imagenet/val --models vmamba_t vim_t --img-size 224 288 384 512
    vmamba validate imagenet/val --models vmamba_t --real-labels
    vmamba validate imagenetv2-matched-frequency --models vmamba_t
    vmamba validate imagenet-c --models vmamba_t --imagenet-c
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
from torch import Tensor, nn

from vmamba.tools import weights
from vmamba.tools.devices import device_name
from vmamba.tools.figures.plots import plot_resolutions
from vmamba.tools.images.batches import add_loader_options, hits, load_images
from vmamba.tools.images.image_files import find_images
from vmamba.tools.images.labelled_folders import (
    LabelledFiles,
    class_indices,
    corruption_folders,
    folder_names,
    read_class_map,
    read_folder,
    read_real_labels,
)
from vmamba.tools.output_files import write_csv
from vmamba.tools.published import published
from vmamba.tools.terminal import open_console, table_of
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive

from rich.console import Console
from rich.progress import Progress

TOP = 5
WIDTH = 140  # of the table where there is no terminal
TITLE = 'Measured accuracy; "published" is the authors\' for ImageNet-1K val at 224, not measured'
SHOWN = ['model', 'weights', 'data', 'labels', 'img_size', 'images', 'top1', 'top5', 'published_top1', 'published_top5']
FORMS = {**dict.fromkeys(SHOWN[-4:], '.2f'), 'images_per_second': '.1f', 'mean top-1 error': '.2f'}


class Folder(NamedTuple):
    """Labelled images under the name that the report shows."""

    name: str
    files: LabelledFiles

    @property
    def paths(self) -> List[Path]:
        return [Path(path) for path, _ in self.files.samples]


def validate(args: argparse.Namespace, folders: Sequence[Folder], progress: Progress) -> Iterator[Dict[str, Any]]:
    """Measures every model at every resolution on every folder."""
    class_map = read_class_map(args.class_map) if args.class_map else None
    classes = {} if args.num_classes is None else {'num_classes': args.num_classes}
    specs = [*args.models, *(weights.spec_of(None, path) for path in args.checkpoint)]
    if not specs:
        raise UserError('no model: give --models NAME[=FILE], or --checkpoint FILE')
    for spec in dict.fromkeys(specs):
        model = weights.load_model(spec, args, **classes)
        if not model.num_classes:
            raise UserError(f'{spec} has no classifier, so there is no accuracy; `vmamba extract` writes features')
        known = class_map
        if class_map is None and model.class_names:
            known = {label: index for index, label in enumerate(model.class_names)}
        labels = [folder_labels(folder, model.num_classes, known, args) for folder in folders]
        for size in dict.fromkeys(args.img_size or [weights.own_size(model)]):
            sized = weights.at_size(model, size).to(args.device)
            for folder, right in zip(folders, labels):
                yield measure(spec, sized, folder, right, size, args, progress)


def measure(
    spec: weights.Spec,
    model: nn.Module,
    folder: Folder,
    labels: Tensor,
    size: int,
    args: argparse.Namespace,
    progress: Progress,
) -> Dict[str, Any]:
    """A row of validate.csv: a model that is ready for this size on a folder, accuracies in %.

    The published figures are the authors' for ImageNet-1K's validation images at 224 pixels, whatever the folder.

    Raises:
        UserError: If no image can be read and has a label.
    """
    config = weights.data_config(model, args, size)
    images = load_images(folder.paths, config, args)
    task = progress.add_task(f'{folder.name} at {size}', total=len(images))
    start, count, sums = time.perf_counter(), 0, torch.zeros(2, dtype=torch.float64)
    for indices, batch, _ in images:
        with torch.inference_mode(), weights.autocast(args):
            logits = model(batch)
        right = labels[indices]
        labelled = right.any(dim=1) if right.ndim == 2 else torch.ones(len(right), dtype=torch.bool)
        count += int(labelled.sum())
        sums += hits(logits.float().cpu(), right)[labelled].double().sum(dim=0)
        progress.advance(task, len(indices))
    if not count:
        raise UserError('no image can be read and has a label')
    top1, top5 = (100 * sums / count).tolist()
    seconds = time.perf_counter() - start
    progress.remove_task(task)
    unreadable = int(images.samples.bad.sum())
    if unreadable:
        progress.console.print(images.samples.report(absolute=True), highlight=False, soft_wrap=True)
    figures = published(spec.name, size, model.num_classes)
    return dict(
        model=spec.name,
        weights=spec.weights or 'published',
        data=folder.name,
        labels='folder' if args.real_labels is None else 'real',
        img_size=size,
        crop_pct=config['crop_pct'],
        images=count,
        unreadable=unreadable,
        top1=top1,
        top5=top5,
        published_top1=figures.top1 if figures else None,
        published_top5=figures.top5 if figures else None,
        images_per_second=len(images) / seconds,
        precision=args.precision,
        device=device_name(args.device),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def folder_labels(folder: Folder, num_classes: int, class_map: Optional[dict], args: argparse.Namespace) -> Tensor:
    """The class of every image, or with ReaL labels whether each class is right."""
    if args.real_labels is not None:
        if num_classes != 1000:
            raise UserError(f"--real-labels are of ImageNet-1K's 1000 classes, the model has {num_classes}")
        return read_real_labels(args.real_labels or None, folder.paths)
    indices = class_indices(folder.name, list(folder.files.class_to_idx), num_classes, class_map)
    return torch.tensor([indices[label] for _, label in folder.files.samples])


def corruptions(rows: pd.DataFrame) -> pd.DataFrame:
    """Error by corruption, as the mean of its severities, and the mean of all corruptions.

    These are plain errors; ImageNet-C's mCE divides them by those of AlexNet.
    """
    keys = ['model', 'weights', 'img_size']
    tables = {}
    for key, own in rows.groupby(keys, sort=False):
        means = (100 - own.top1).groupby(own.data.str.split('/').str[-2], sort=False).mean()
        tables[key] = pd.concat([means, pd.Series({f'mean of {len(means)}': means.mean()})])
    return pd.concat(tables, names=[*keys, 'corruption']).rename('mean top-1 error').reset_index()


def accuracy_lines(rows: pd.DataFrame) -> Tuple[Dict[str, pd.Series], Dict[str, pd.Series]]:
    """Accuracy by size, as the mean of the folders, measured and published, of each model.

    A model is named with its weights where several were measured.
    """
    runs = rows[['model', 'weights']].drop_duplicates()
    measured, known = {}, {}
    for model, file in runs.itertuples(index=False):
        label = model if (runs.model == model).sum() == 1 else f'{model}, {file}'
        sizes = rows[(rows.model == model) & (rows.weights == file)].groupby('img_size')
        measured[label], known[label] = sizes.top1.mean(), sizes.published_top1.mean().dropna()
    return measured, known


def read_folders(args: argparse.Namespace, console: Console) -> List[Folder]:
    folders: List[Folder] = []
    for root, name in zip(args.folders, folder_names(args.folders)):
        if args.imagenet_c:
            found = corruption_folders(root)
            folders += [Folder(path.relative_to(root).as_posix(), read_folder(path, top=True)) for path in found]
        elif args.real_labels is not None:  # these go by the names of the images, however they lie
            folders.append(Folder(name, LabelledFiles([(str(path), 0) for path in find_images(root)], {}, root)))
        else:
            folders.append(Folder(name, read_folder(root, top=True)))
    twice = [name for name, count in Counter(folder.name for folder in folders).items() if count > 1]
    if twice:
        raise UserError(f'{twice[0]} is there more than once; give folders that hold other images')
    for folder in folders:
        empty = [Path(path).name for path in folder.files.empty]
        if empty:
            names = ', '.join(empty[:TOP])
            console.print(f'{folder.name}: {len(empty)} class folders without images: {names}', highlight=False)
    return folders


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        'folders', nargs='+', type=Path, help='folders of class folders of images, of images with --real-labels'
    )
    parser.add_argument(
        '--models', nargs='+', type=weights.parse_spec, default=[], metavar='NAME[=FILE]', help=weights.SPEC_HELP
    )
    parser.add_argument(
        '--checkpoint', nargs='+', type=Path, default=[], metavar='FILE', help='files of `vmamba train`, as more models'
    )
    parser.add_argument('--num-classes', type=positive, help="default: those of the checkpoint's classifier")
    parser.add_argument('--img-size', nargs='+', type=positive, help="sides of the images; default: the model's own")
    parser.add_argument(
        '--real-labels', nargs='?', type=Path, const=False, help="score by ReaL's labels, of FILE or of timm's copy"
    )
    parser.add_argument('--imagenet-c', action='store_true', help='folders hold CORRUPTION/SEVERITY/CLASS; uncropped')
    parser.add_argument('--class-map', type=Path, help="text file of the class folders' names in the model's order")
    parser.add_argument('--output', type=Path, default=Path('validate'), help='folder of the results')
    add_loader_options(parser)
    weights.add_model_options(parser)
    weights.add_precision_option(parser)
    args = parser.parse_args(argv)
    if args.imagenet_c and args.crop_pct is None:
        args.crop_pct = 1.0  # its images are crops of 224 pixels already, which its authors do not resize
    return args


@one_line_errors('validate.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    console = open_console(WIDTH)
    folders = read_folders(args, console)
    rows: List[Dict[str, Any]] = []
    try:
        with Progress(console=console, transient=True) as progress:
            for row in validate(args, folders, progress):
                rows.append(row)
                write_csv(args.output / 'validate.csv', rows)  # each time, so that a kill keeps what is measured
    finally:
        if rows:
            report(pd.DataFrame(rows).astype({name: float for name in SHOWN[-2:]}), args, console)


def report(rows: pd.DataFrame, args: argparse.Namespace, console: Console) -> None:
    """Prints the tables and draws the figure."""
    shown = rows[[*SHOWN, 'images_per_second']].dropna(axis=1, how='all')
    console.print(table_of(shown, TITLE, FORMS))
    if args.imagenet_c:
        console.print(table_of(corruptions(rows), 'ImageNet-C, plain errors in %', FORMS))
    if rows.img_size.nunique() > 1:
        plot_resolutions(*accuracy_lines(rows), args.output / 'validate.png')
    console.print(f'Results are in {args.output}/')


if __name__ == '__main__':
    main()
