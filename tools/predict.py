"""Classifies images: prints the most probable classes of each.

The images are preprocessed as the model's configuration says. The class names are those in the checkpoint, if
`vmamba train` wrote it, or ImageNet's.

    vmamba predict photo.jpg --model vmamba_t
    vmamba predict photos/ --checkpoint runs/pets/best.pt --top 3
    find . -name '*.jpg' | vmamba predict - --model vmamba_t --checkpoint vmamba_t.safetensors
"""

import argparse
import sys
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vmamba.tools import weights
from vmamba.tools.images.batches import Images, add_loader_options, load_images
from vmamba.tools.images.image_files import find_images
from vmamba.tools.user_errors import Parser, UserError, file_name, one_line_errors, positive

MOST_DRAWN = 50  # images in one picture
STDIN = Path('-')


def find_all(sources: Sequence[Path]) -> List[Path]:
    """The images of files, folders and lists, in order; `-` reads a list from the standard input."""
    paths: List[Path] = []
    for source in sources:
        if source == STDIN:
            listed = [Path(line.strip()) for line in sys.stdin if line.strip()]
            if not listed:
                raise UserError('the list on the standard input is empty')
            paths += listed
        else:
            paths += find_images(source)
    return paths


def class_names(model: nn.Module) -> List[str]:
    """Name of every class: those in the checkpoint, else ImageNet's where the number of classes is, else indices."""
    if model.class_names:
        return model.class_names
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f'class {i}' for i in range(model.num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]


def predict(model: nn.Module, images: Images, args: argparse.Namespace) -> Iterator[Tuple[int, Tensor]]:
    """The index of every readable image and its probabilities [classes]."""
    for indices, batch, _ in images:
        with torch.inference_mode(), weights.autocast(args):
            logits = model(batch)
        yield from zip(indices, logits.float().softmax(-1).cpu())


@one_line_errors('predict.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    spec = weights.spec_of(args.model, args.checkpoint)
    paths = find_all(args.images)
    if args.draw and len(paths) > MOST_DRAWN:
        raise UserError(f'--draw takes at most {MOST_DRAWN} images, got {len(paths)}')
    if args.draw:
        from vmamba.tools.figures.plots import plot_predictions  # here: only this needs matplotlib
    model = weights.load_model(spec, args)
    if not model.num_classes:
        raise UserError(f'{spec} has no classifier; `vmamba extract` writes its features')
    if spec.weights == 'untrained':
        print('The weights are random: the predictions mean nothing.', file=sys.stderr)
    size = args.img_size or weights.own_size(model)
    model, config = weights.at_size(model, size).to(args.device), weights.data_config(model, args, size)
    names = class_names(model)
    images = load_images(paths, config, args)
    predictions: List[Tuple[Path, List[Tuple[str, float]]]] = []
    for number, probabilities in predict(model, images, args):
        path = paths[number]
        values, indices = probabilities.topk(min(args.top, len(names)))
        found = [(names[index], value) for index, value in zip(indices.tolist(), values.tolist())]
        print(path, *(f'{value:8.2%}  {name}' for name, value in found), sep='\n')
        if args.draw:
            predictions.append((path, found))
    skipped = images.samples.report(absolute=True)
    if skipped:
        print(skipped, file=sys.stderr)
    if predictions:
        plot_predictions(predictions, args.draw)
        print(f'Wrote {args.draw}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        'images', nargs='+', type=Path, help='files, folders, text files with a path a line, or - for such a list'
    )
    weights.add_spec_options(parser)
    parser.add_argument('--top', type=positive, default=5, help='classes to name')
    parser.add_argument('--draw', type=file_name('.png'), metavar='FILE', help='PNG of the images with their classes')
    parser.add_argument('--img-size', type=positive, help="side of the images; default: the model's own")
    add_loader_options(parser)
    weights.add_model_options(parser)
    weights.add_precision_option(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
