"""Top-1 and top-5 accuracy of models on folders of images, also at other resolutions.

Each model preprocesses as its own configuration says. Writes validate.csv, and validate.png for several resolutions.

    vmamba validate imagenet/val --models vmamba_t vim_s=vim_s_midclstok_80p5acc.pth
    vmamba validate imagenet/val --models vmamba_t vim_t --img-size 224 288 384 512
    vmamba validate imagenet/val --models vmamba_t --real-labels
    vmamba validate imagenetv2-matched-frequency --models vmamba_t
    vmamba validate imagenet-c --models vmamba_t --imagenet-c
"""

import argparse
import time
from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import FrozenSet, Iterator, List, Optional, Sequence

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from torch import nn
from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.figures.validate_figure import plot_resolutions
from vmamba.tools.images.image_files import UNREADABLE, Unreadable, add_loader_options, find_images, make_loader
from vmamba.tools.images.labelled_folders import (
    Folder,
    class_indices,
    corruption_folders,
    folder_names,
    read_class_map,
    read_folder,
    read_real_labels,
)
from vmamba.tools.output_files import write_csv
from vmamba.tools.published import published
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive
from vmamba.tools.weights import (
    SPEC_HELP,
    Spec,
    add_model_options,
    add_precision_option,
    amp_dtype,
    at_size,
    data_config,
    load_model,
    own_size,
    parse_spec,
)

TOP = 5
WIDTH = 140  # of the table where there is no terminal


@dataclass
class Row:
    """One line of validate.csv: a model on a folder at a resolution; accuracies in %.

    `published_top1` and `published_top5` are the authors' figures for ImageNet-1K's validation images at 224 pixels,
    whatever the folder; they are not measured.
    """

    model: str
    weights: str
    data: str
    labels: str
    img_size: int
    crop_pct: float
    images: int
    unreadable: int
    top1: float
    top5: float
    published_top1: Optional[float]
    published_top5: Optional[float]
    images_per_second: float
    precision: str
    device: str
    torch: str = torch.__version__
    timm: str = timm.__version__


def predict(
    model: nn.Module, folder: Folder, config: dict, args: argparse.Namespace, unreadable: Unreadable, progress: Progress
) -> np.ndarray:
    """The model's first five classes of every image [n, 5], or as many as it has; rows of -1 for unreadable images."""
    loader = make_loader(folder.samples, config, args)
    task = progress.add_task(f'{folder.name} at {config["input_size"][-1]}', total=len(folder.samples))
    predictions: List[np.ndarray] = []
    for images, targets in loader:
        with torch.inference_mode(), torch.autocast(args.device, args.amp_dtype, enabled=args.amp_dtype is not None):
            logits = model(images.to(args.device))
        top = logits.float().topk(min(TOP, logits.shape[-1])).indices.cpu().numpy()
        for i in np.flatnonzero(targets.numpy() == UNREADABLE):
            unreadable.add(folder.samples[sum(map(len, predictions)) + i][0])
            top[i] = UNREADABLE
        predictions.append(top)
        progress.advance(task, len(top))
    progress.remove_task(task)
    return np.concatenate(predictions)


def accuracies(predictions: np.ndarray, labels: Sequence[FrozenSet[int]]) -> tuple[int, float, float]:
    """Images that count, top-1 and top-5 accuracy in %: a prediction is right if it is among an image's labels.

    Unreadable images and those without labels do not count.
    """
    hits = np.array(
        [[p in right for p in row] for row, right in zip(predictions, labels) if right and row[0] != UNREADABLE]
    )
    if not len(hits):
        raise UserError('no image can be read and has a label')
    return len(hits), 100 * float(hits[:, 0].mean()), 100 * float(hits.any(axis=1).mean())


def validate(args: argparse.Namespace, folders: Sequence[Folder], progress: Progress) -> Iterator[Row]:
    """Measures every model at every resolution on every folder."""
    class_map = read_class_map(args.class_map) if args.class_map else None
    classes = {} if args.num_classes is None else {'num_classes': args.num_classes}
    for spec in dict.fromkeys(args.models):
        model = load_model(spec, args, **classes)
        if not model.num_classes:
            raise UserError(
                f'{spec} has no classifier, so there is no accuracy; tools/extract_features.py has features'
            )
        labels = [folder_labels(folder, model.num_classes, class_map, args) for folder in folders]
        for size in dict.fromkeys(args.img_size or [own_size(model)]):
            sized = at_size(model, size).to(args.device)
            for folder, right in zip(folders, labels):
                yield measure(spec, sized, folder, right, size, args, progress)


def measure(
    spec: Spec,
    model: nn.Module,
    folder: Folder,
    labels: Sequence[FrozenSet[int]],
    size: int,
    args: argparse.Namespace,
    progress: Progress,
) -> Row:
    """Measures a model that is ready for this size on a folder."""
    config = data_config(model, args, size)
    unreadable = Unreadable(args.skip_bad_images)
    start = time.perf_counter()
    predictions = predict(model, folder, config, args, unreadable, progress)
    seconds = time.perf_counter() - start
    if unreadable.paths:
        progress.console.print(unreadable.summary(), highlight=False, soft_wrap=True)
    images, top1, top5 = accuracies(predictions, labels)
    figures = published(spec.name, size, model.num_classes)
    return Row(
        model=spec.name,
        weights=spec.weights or 'published',
        data=folder.name,
        labels='folder' if args.real_labels is None else 'real',
        img_size=size,
        crop_pct=config['crop_pct'],
        images=images,
        unreadable=len(unreadable.paths),
        top1=top1,
        top5=top5,
        published_top1=figures.top1 if figures else None,
        published_top5=figures.top5 if figures else None,
        images_per_second=len(predictions) / seconds,
        precision=args.precision,
        device=device_name(torch.device(args.device)),
    )


def folder_labels(
    folder: Folder, num_classes: int, class_map: Optional[dict], args: argparse.Namespace
) -> List[FrozenSet[int]]:
    """The right classes of every image."""
    if args.real_labels is not None:
        if num_classes != 1000:
            raise UserError(f"--real-labels are of ImageNet-1K's 1000 classes, the model has {num_classes}")
        return read_real_labels(args.real_labels or None, [path for path, _ in folder.samples])
    indices = class_indices(folder, num_classes, class_map)
    return [frozenset([indices[label]]) for _, label in folder.samples]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Measured accuracies, with the published ones beside them."""
    title = 'Measured accuracy; "published" is the authors\' for ImageNet-1K val at 224, not measured'
    texts = {
        'model': [row.model for row in rows],
        'weights': [row.weights for row in rows],
        'data': [row.data for row in rows],
        'labels': [row.labels for row in rows],
    }
    numbers = {
        'img_size': [str(row.img_size) for row in rows],
        'images': [str(row.images) for row in rows],
        'top-1': [f'{row.top1:.2f}' for row in rows],
        'top-5': [f'{row.top5:.2f}' for row in rows],
        'published top-1': [f'{row.published_top1:.2f}' if row.published_top1 else '' for row in rows],
        'published top-5': [f'{row.published_top5:.2f}' if row.published_top5 else '' for row in rows],
        'images/s': [f'{row.images_per_second:.1f}' for row in rows],
    }
    numbers = {name: column for name, column in numbers.items() if any(column)}
    table = Table(title=title)
    for name in texts:
        table.add_column(name, overflow='fold')  # in a narrow terminal nothing is cut off
    for name in numbers:
        table.add_column(name.replace(' ', '\n'), justify='right', no_wrap=True)
    for cells in zip(*texts.values(), *numbers.values()):
        table.add_row(*cells)
    console.print(table)


def print_corruptions(rows: Sequence[Row], console: Console) -> None:
    """Error by corruption, as the mean of its severities, and the mean of all corruptions.

    These are plain errors; ImageNet-C's mCE divides them by those of AlexNet.
    """
    columns = ('model', Column('weights', overflow='fold'), 'img_size', 'corruption', 'mean top-1 error')
    table = Table(*columns, title='ImageNet-C, plain errors in %')
    for model, weights, size in dict.fromkeys((row.model, row.weights, row.img_size) for row in rows):
        errors: dict[str, List[float]] = {}
        for row in rows:
            if (row.model, row.weights, row.img_size) == (model, weights, size):
                errors.setdefault(row.data.split('/')[-2], []).append(100 - row.top1)
        means = {name: float(np.mean(found)) for name, found in errors.items()}
        for name, mean in [*means.items(), (f'mean of {len(means)}', float(np.mean(list(means.values()))))]:
            table.add_row(model, weights, str(size), name, f'{mean:.2f}')
    console.print(table)


def read_folders(args: argparse.Namespace, console: Console) -> List[Folder]:
    folders: List[Folder] = []
    for root, name in zip(args.folders, folder_names(args.folders)):
        if args.imagenet_c:
            folders += [read_folder(path, path.relative_to(root).as_posix()) for path in corruption_folders(root)]
        elif args.real_labels is not None:  # these go by the names of the images, however they lie
            folders.append(Folder(name, [(path, 0) for path in find_images(root)], [], []))
        else:
            folders.append(read_folder(root, name))
    twice = [name for name, count in Counter(folder.name for folder in folders).items() if count > 1]
    if twice:
        raise UserError(f'{twice[0]} is there more than once; give folders that hold other images')
    for folder in folders:
        if folder.empty:
            names = ', '.join(folder.empty[:TOP])
            console.print(f'{folder.name}: {len(folder.empty)} class folders without images: {names}', highlight=False)
    return folders


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    examples = '\n'.join(__doc__.splitlines()[4:])
    parser = Parser(description=__doc__.splitlines()[0], epilog=examples)
    parser.add_argument(
        'folders', nargs='+', type=Path, help='folders of class folders of images, of images with --real-labels'
    )
    parser.add_argument('--models', nargs='+', type=parse_spec, required=True, metavar='NAME[=FILE]', help=SPEC_HELP)
    parser.add_argument('--num-classes', type=positive, help="default: those of the checkpoint's classifier")
    parser.add_argument('--img-size', nargs='+', type=positive, help="sides of the images; default: the model's own")
    parser.add_argument(
        '--real-labels', nargs='?', type=Path, const=False, help="score by ReaL's labels, of FILE or of timm's copy"
    )
    parser.add_argument('--imagenet-c', action='store_true', help='folders hold CORRUPTION/SEVERITY/CLASS; uncropped')
    parser.add_argument('--class-map', type=Path, help="text file of the class folders' names in the model's order")
    parser.add_argument('--output', type=Path, default=Path('validate'), help='folder of the results')
    add_loader_options(parser)
    add_model_options(parser)
    add_precision_option(parser)
    args = parser.parse_args(argv)
    if args.imagenet_c and args.crop_pct is None:
        args.crop_pct = 1.0  # its images are crops of 224 pixels already, which its authors do not resize
    args.device = pick_device(args.device).type
    args.amp_dtype = amp_dtype(args)
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    console = open_console(WIDTH)
    with one_line_errors('validate.py'):
        folders = read_folders(args, console)
        args.output.mkdir(parents=True, exist_ok=True)
        rows: List[Row] = []
        try:
            with Progress(console=console, transient=True) as progress:
                for row in validate(args, folders, progress):
                    rows.append(row)
                    table = [[field.name for field in fields(Row)], *map(astuple, rows)]
                    write_csv(args.output / 'validate.csv', table)  # each time, so that a kill keeps what is measured
        finally:
            if rows:
                report(rows, args, console)


def report(rows: Sequence[Row], args: argparse.Namespace, console: Console) -> None:
    """Prints the tables and draws the figure."""
    print_table(rows, console)
    if args.imagenet_c:
        print_corruptions(rows, console)
    if len({row.img_size for row in rows}) > 1:
        plot_resolutions(rows, args.output / 'validate.png')
    console.print(f'Results are in {args.output}/')


if __name__ == '__main__':
    main()
