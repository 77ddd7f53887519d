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
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from torch import Tensor, nn

from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.figures.plots import plot_resolutions
from vmamba.tools.images.batches import Images, add_loader_options, hits, load_images
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
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive
from vmamba.tools.weights import (
    SPEC_HELP,
    Spec,
    add_model_options,
    add_precision_option,
    at_size,
    autocast,
    data_config,
    load_model,
    own_size,
    parse_spec,
    spec_of,
)

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

TOP = 5
WIDTH = 140  # of the table where there is no terminal


class Folder(NamedTuple):
    """Labelled images under the name that the report shows."""

    name: str
    files: LabelledFiles

    @property
    def paths(self) -> List[Path]:
        return [Path(path) for path, _ in self.files.samples]


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


def count_hits(
    model: nn.Module, images: Images, labels: Tensor, args: argparse.Namespace, advance: Callable[[int], None]
) -> Tuple[int, float, float]:
    """Number of readable images with a label, top-1 and top-5 accuracy in %.

    Args:
        model: On the device.
        images: Batches.
        labels: Of all images, see `images.batches.hits`.
        args: With the device and precision.
        advance: Called with the number of images of each batch.

    Raises:
        UserError: If there is no such image.
    """
    count, sums = 0, torch.zeros(2, dtype=torch.float64)
    for indices, batch, _ in images:
        with torch.inference_mode(), autocast(args):
            logits = model(batch)
        right = labels[indices]
        labelled = right.any(dim=1) if right.ndim == 2 else torch.ones(len(right), dtype=torch.bool)
        count += int(labelled.sum())
        sums += hits(logits.float().cpu(), right)[labelled].double().sum(dim=0)
        advance(len(indices))
    if not count:
        raise UserError('no image can be read and has a label')
    top1, top5 = (100 * sums / count).tolist()
    return count, top1, top5


def validate(args: argparse.Namespace, folders: Sequence[Folder], progress: Progress) -> Iterator[Row]:
    """Measures every model at every resolution on every folder."""
    class_map = read_class_map(args.class_map) if args.class_map else None
    classes = {} if args.num_classes is None else {'num_classes': args.num_classes}
    specs = [*args.models, *(spec_of(None, path) for path in args.checkpoint)]
    if not specs:
        raise UserError('no model: give --models NAME[=FILE], or --checkpoint FILE')
    for spec in dict.fromkeys(specs):
        model = load_model(spec, args, **classes)
        if not model.num_classes:
            raise UserError(f'{spec} has no classifier, so there is no accuracy; `vmamba extract` writes features')
        known = class_map
        if class_map is None and model.class_names:
            known = {label: index for index, label in enumerate(model.class_names)}
        labels = [folder_labels(folder, model.num_classes, known, args) for folder in folders]
        for size in dict.fromkeys(args.img_size or [own_size(model)]):
            sized = at_size(model, size).to(args.device)
            for folder, right in zip(folders, labels):
                yield measure(spec, sized, folder, right, size, args, progress)


def measure(
    spec: Spec,
    model: nn.Module,
    folder: Folder,
    labels: Tensor,
    size: int,
    args: argparse.Namespace,
    progress: Progress,
) -> Row:
    """Measures a model that is ready for this size on a folder."""
    config = data_config(model, args, size)
    images = load_images(folder.paths, config, args)
    task = progress.add_task(f'{folder.name} at {size}', total=len(images))
    start = time.perf_counter()
    count, top1, top5 = count_hits(model, images, labels, args, lambda n: progress.advance(task, n))
    seconds = time.perf_counter() - start
    progress.remove_task(task)
    unreadable = int(images.samples.bad.sum())
    if unreadable:
        progress.console.print(images.samples.report(absolute=True), highlight=False, soft_wrap=True)
    figures = published(spec.name, size, model.num_classes)
    return Row(
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
        device=device_name(torch.device(args.device)),
    )


def folder_labels(folder: Folder, num_classes: int, class_map: Optional[dict], args: argparse.Namespace) -> Tensor:
    """The class of every image, or with ReaL labels whether each class is right."""
    if args.real_labels is not None:
        if num_classes != 1000:
            raise UserError(f"--real-labels are of ImageNet-1K's 1000 classes, the model has {num_classes}")
        return read_real_labels(args.real_labels or None, folder.paths)
    indices = class_indices(folder.name, list(folder.files.class_to_idx), num_classes, class_map)
    return torch.tensor([indices[label] for _, label in folder.files.samples])


COLUMNS = {
    **dict.fromkeys(('model', 'weights', 'data', 'labels', 'img_size', 'images'), '{}'),
    **dict.fromkeys(('top1', 'top5', 'published_top1', 'published_top5'), '{:.2f}'),
    'images_per_second': '{:.1f}',
}


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Measured accuracies beside the published ones."""
    table = Table(title='Measured accuracy; "published" is the authors\' for ImageNet-1K val at 224, not measured')
    columns = []
    for name, form in COLUMNS.items():
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            is_text = isinstance(values[0], str)  # folded, so that nothing is cut off in a narrow terminal
            style = dict(overflow='fold') if is_text else dict(justify='right', no_wrap=True)
            table.add_column(name.replace('_', '\n').replace('top', 'top-'), **style)
            columns.append(['' if value is None else form.format(value) for value in values])
    for cells in zip(*columns):
        table.add_row(*cells)
    console.print(table)


def print_corruptions(rows: Sequence[Row], console: Console) -> None:
    """Error by corruption, as the mean of its severities, and the mean of all corruptions.

    These are plain errors; ImageNet-C's mCE divides them by those of AlexNet.
    """
    columns = ('model', Column('weights', overflow='fold'), 'img_size', 'corruption', 'mean top-1 error')
    table = Table(*columns, title='ImageNet-C, plain errors in %')
    for key, own in grouped(rows, lambda row: (row.model, row.weights, str(row.img_size))).items():
        corruptions = grouped(own, lambda row: row.data.split('/')[-2])
        means = {name: 100 - mean(row.top1 for row in found) for name, found in corruptions.items()}
        for name, error in [*means.items(), (f'mean of {len(means)}', mean(means.values()))]:
            table.add_row(*key, name, f'{error:.2f}')
    console.print(table)


def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> Dict[Any, List[Row]]:
    """The rows of each value of a key, in order."""
    groups: Dict[Any, List[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def draw_resolutions(rows: Sequence[Row], path: Path) -> None:
    """Draws a line for each model, named with its weights where several were measured, as the mean of the folders."""
    runs = grouped(rows, lambda row: (row.model, row.weights))
    models = [model for model, _ in runs]
    lines, known = {}, {}
    for (model, weights), own in runs.items():
        label = model if models.count(model) == 1 else f'{model}, {weights}'
        sizes = grouped(own, lambda row: row.img_size)
        lines[label] = {size: mean(row.top1 for row in found) for size, found in sizes.items()}
        known[label] = {row.img_size: row.published_top1 for row in own if row.published_top1 is not None}
    plot_resolutions(lines, known, path)


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
    examples = '\n'.join(__doc__.splitlines()[4:])
    parser = Parser(description=__doc__.splitlines()[0], epilog=examples)
    parser.add_argument(
        'folders', nargs='+', type=Path, help='folders of class folders of images, of images with --real-labels'
    )
    parser.add_argument('--models', nargs='+', type=parse_spec, default=[], metavar='NAME[=FILE]', help=SPEC_HELP)
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
    add_model_options(parser)
    add_precision_option(parser)
    args = parser.parse_args(argv)
    if args.imagenet_c and args.crop_pct is None:
        args.crop_pct = 1.0  # its images are crops of 224 pixels already, which its authors do not resize
    args.device = pick_device(args.device).type
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
        draw_resolutions(rows, args.output / 'validate.png')
    console.print(f'Results are in {args.output}/')


if __name__ == '__main__':
    main()
