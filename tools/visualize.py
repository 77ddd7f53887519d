"""Pictures of what a model uses: effective receptive fields, and the "attention" of its scans.

`erf` draws, for untrained weights and for the given ones, how much each pixel changes the centre of a feature map:

    E[p] = mean over images of sum_c |d (sum_k F[k, h // 2, w // 2]) / d x[c, p]|

for the map F [d, h, w] of a stage or block and the normalised image x. Titles give the sides of the squares around the
centre that hold 20, 50 and 90 % of E.

`attention` draws what a pixel i takes from the others along each route of SS2D, or each direction of Vim. A scan

    h_l = exp(delta_l A) h_{l-1} + delta_l B_l x_l,    y_l = <C_l, h_l> + D x_l

is y = M x + D x for every channel, with

    M_ij = sum_n C_i[n] exp(A[n] (delta_{j+1} + ... + delta_i)) delta_j B_j[n]    for j <= i on the route, else 0.

The panels show |M_ij| of each route at the place of pixel j, and |sum of the routes' M_ij|, averaged over channels
(or of one --channel). M is exact and of this image; the convolution before the scan and the gates after it are not in
it, nor is D x, which is the pixel's own.

    vmamba visualize erf images/ --model vmamba_t --img-size 512 --count 50
    vmamba visualize attention photo.jpg --model vmamba_t --pixel 120 80 --layers stages.2.blocks.7
    vmamba visualize attention photo.jpg --model vim_s=vim_s.pth --class-token --whole
"""

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vmamba.models.vim import Vim
from vmamba.tools import weights
from vmamba.tools.features.maps import POOLED, normalised, parse_wanted, patch_layout
from vmamba.tools.features.receptive_field import Field, receptive_fields
from vmamba.tools.features.scan_rows import inputs_of, mixers_of, routes_of, scan_rows, token_of_patch
from vmamba.tools.figures.plots import Layer, plot_attention, plot_receptive_fields
from vmamba.tools.images.batches import Images, add_loader_options, load_images
from vmamba.tools.images.decoding import READ_ERRORS, image_mode, read_image
from vmamba.tools.images.image_files import find_images
from vmamba.tools.output_files import write_atomically, write_csv
from vmamba.tools.user_errors import Parser, UserError, nearest, one_line_errors, positive, positive_float

from rich.console import Console
from rich.progress import Progress

ROUTES = ['rows \u2192', 'columns \u2193', 'rows \u2190', 'columns \u2191']
DIRECTIONS = ['forward', 'backward']
SHOWN = 4  # of Vim's blocks, where none are named


def sized_model(spec: weights.Spec, args: argparse.Namespace, whole: bool = False) -> Tuple[nn.Module, int]:
    """The model and the side of the images for it, or the shorter one of whole images."""
    model = weights.load_model(spec, args, num_classes=0)
    size = args.img_size or weights.own_size(model)
    if whole:
        weights.allow_any_size(model)
    return (model if whole else weights.at_size(model, size)).to(args.device), size


def spread(names: List[str], count: int) -> List[str]:
    """That many of the names, evenly spaced, the last among them."""
    return [names[round((i + 1) * len(names) / count) - 1] for i in range(count)] if len(names) > count else names


def read_images(images: Images) -> List[Tensor]:
    """Preprocessed images [1, C, H, W] on the device."""
    return [image[None] for _, batch, _ in images for image in batch]


def read_whole(path: Path, model: nn.Module, size: int, args: argparse.Namespace) -> Tensor:
    """All of an image at its own proportions [1, C, H, W]: the shorter side has this size, Vim's whole patches."""
    config = weights.data_config(model, args, size)
    try:
        image = read_image(path, image_mode(config['input_size'][0]))
    except READ_ERRORS as error:
        raise UserError(f'cannot read the image {path}: {error}') from error
    patch, stride = patch_layout(model)
    scale = size / min(image.size)
    sides = [patch + max(round((side * scale - patch) / stride), 0) * stride for side in image.size]
    pixels = np.asarray(image.resize(sides, Image.Resampling[config['interpolation'].upper()]))
    return normalised(pixels.reshape(*pixels.shape[:2], -1), config, args.device)


def draw_receptive_fields(args: argparse.Namespace, console: Console) -> None:
    """Writes erf.png, erf.csv and erf.npz."""
    specs = list(dict.fromkeys([args.model.untrained(), args.model]))
    fields: Dict[str, Dict[str, Field]] = {}
    batches: Optional[Images] = None
    images: List[Tensor] = []
    paths = find_images(args.images)[: args.count]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task('Receptive fields', total=len(specs) * len(paths))
        for spec in specs:
            model, size = sized_model(spec, args)
            names = args.features or spread([info['module'] for info in map(dict, model.feature_info)], SHOWN)
            if POOLED in names:
                raise UserError(f'{POOLED} features have no centre: name maps by --features')
            wanted = parse_wanted(model, names, norm=False)
            batches = batches or load_images(paths, weights.data_config(model, args, size), args)
            images = images or read_images(batches)
            fields[_label(spec, args)] = receptive_fields(model, images, wanted, lambda: progress.advance(task))
    title = f'{args.model.name}, effective receptive field at {size} x {size}, {len(images)} images'
    plot_receptive_fields(fields, title, args.output / 'erf.png')
    arrays = {f'{label}: {name}': field.values for label, found in fields.items() for name, field in found.items()}
    write_atomically(args.output / 'erf.npz', lambda file: np.savez(file, **arrays))
    rows = [
        dict(weights=label, feature=name, share=share, side=side)
        for label, found in fields.items()
        for name, field in found.items()
        for share, side in field.sides.items()
    ]
    common = dict(model=args.model.name, img_size=size, images=len(images))
    write_csv(args.output / 'erf.csv', [{**common, **row} for row in rows])
    skipped = batches.samples.report(absolute=True)
    if skipped:
        console.print(skipped, highlight=False, soft_wrap=True)


def _label(spec: weights.Spec, args: argparse.Namespace) -> str:
    return f'untrained, seed {args.seed}' if spec.weights == 'untrained' else spec.weights or 'published'


def draw_attention(args: argparse.Namespace, console: Console) -> None:
    """Writes attention.png and attention.npz, the drawn maps by layer."""
    paths = find_images(args.images)
    if len(paths) > 1:
        raise UserError(f'attention is of one image, {args.images} holds {len(paths)}: name one, such as {paths[0]}')
    model, size = sized_model(args.model, args, args.whole)
    names = choose_layers(model, args.layers)
    if args.whole:
        image = read_whole(paths[0], model, size, args)
    else:
        args.skip_bad_images = False
        (image,) = read_images(load_images(paths, weights.data_config(model, args, size), args))
    height, width = image.shape[-2:]
    pixel = tuple(args.pixel) if args.pixel else (width // 2, height // 2)
    if not all(0 <= x < side for x, side in zip(pixel, (width, height))):
        raise UserError(f'--pixel {pixel[0]} {pixel[1]} is outside of the {width} x {height} image')
    is_vim = isinstance(model, Vim)
    if args.class_token and not is_vim:
        raise UserError(f'--class-token is for Vim, {args.model.name} has none')
    mixers, inputs = mixers_of(model), inputs_of(model, image, names)
    layers = []
    with torch.inference_mode():
        for name in names:
            routes = routes_of(mixers[name], inputs[name])
            grid = model.patch_embed.dynamic_feat_size((height, width)) if is_vim else inputs[name].shape[1:3]
            layer = _vim_layer if is_vim else _vmamba_layer
            layers.append(layer(model, name, routes, grid, pixel, args))
    shown = shown_image(image, weights.data_config(model, args, size))
    target = 'the class token' if args.class_token else f'pixel {pixel[0]}, {pixel[1]}'
    title = (
        f'{args.model}: |M| of {target}, {"mean of channels" if args.channel is None else f"channel {args.channel}"}'
    )
    marked = None if args.class_token else pixel
    routes_drawn = DIRECTIONS if is_vim else ROUTES
    plot_attention(shown, layers, routes_drawn, marked, args.gamma, title, args.output / 'attention.png')
    maps = {layer.name: layer.maps for layer in layers}
    write_atomically(args.output / 'attention.npz', lambda file: np.savez(file, **maps))


def choose_layers(model: nn.Module, wanted: Optional[List[str]]) -> List[str]:
    """Names of blocks: those wanted, or the last of each stage (VMamba) or some of all depths (Vim)."""
    known = list(mixers_of(model))
    if not known:
        raise UserError(f'{type(model).__name__} has no selective scans: attention is for VMamba and Vim')
    for name in wanted or []:
        if name not in known:
            raise UserError(f'{type(model).__name__} has no layer {name!r}{nearest(name, known)}')
    last = {name.rpartition('.blocks.')[0]: name for name in known}  # of each stage; Vim has one
    return wanted or (list(last.values()) if len(last) > 1 else spread(known, SHOWN))


def shown_weights(rows: Tensor, args: argparse.Namespace) -> Tensor:
    """Rows [K, D, L] -> weights to draw [K + 1, L], those of the sum of the routes last."""
    if args.channel is not None:
        if not 0 <= args.channel < rows.shape[1]:
            raise UserError(f'--channel {args.channel}: the layer has the channels 0 to {rows.shape[1] - 1}')
        rows = rows[:, args.channel, None]
    return torch.cat([rows, rows.sum(dim=0, keepdim=True)]).abs().mean(dim=1)


def _vmamba_layer(model, name, routes, grid: Sequence[int], pixel: Tuple[int, int], args: argparse.Namespace) -> Layer:
    height, width = grid
    stride = next(info['reduction'] for info in model.feature_info if name.startswith(f'{info["module"]}.'))
    column, row = (x // stride for x in pixel)
    maps = shown_weights(scan_rows(routes, row * width + column), args).unflatten(-1, (height, width))
    return Layer(name, maps.cpu().numpy(), (-0.5, width * stride - 0.5, height * stride - 0.5, -0.5))


def _vim_layer(model, name, routes, grid: Sequence[int], pixel: Tuple[int, int], args: argparse.Namespace) -> Layer:
    height, width = grid
    patch, stride = model.patch_embed.patch_size, model.patch_embed.stride
    margin = (patch - stride) / 2  # the map's pixels are drawn around the centres of overlapping patches
    column, row = (min(max(int((x - margin) // stride), 0), n - 1) for x, n in zip(pixel, (width, height)))
    middle, patches = height * width // 2, height * width
    position = middle if args.class_token else token_of_patch(row * width + column, patches)
    drawn = shown_weights(scan_rows(routes, position), args)
    maps = torch.cat([drawn[:, :middle], drawn[:, middle + 1 :]], dim=1).unflatten(-1, (height, width))
    right, bottom = (margin + n * stride - 0.5 for n in (width, height))
    return Layer(name, maps.cpu().numpy(), (margin - 0.5, right, bottom, margin - 0.5))


def shown_image(image: Tensor, config: dict) -> np.ndarray:
    """Normalised image [1, C, H, W] -> [H, W, 3] in 0 to 1."""
    mean, std = (image.new_tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = (image[0] * std + mean).clamp(0, 1).permute(1, 2, 0)
    return pixels.expand(-1, -1, 3).cpu().numpy()


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar='erf | attention')
    erf = commands.add_parser('erf', help='effective receptive fields, before and after loading weights')
    erf.set_defaults(draw=draw_receptive_fields)
    erf.add_argument('images', type=Path, help='folder, list or file of images')
    erf.add_argument('--features', nargs='+', help='maps, such as stages.2 or blocks.11; default: of all depths')
    erf.add_argument('--count', type=positive, default=50, help='images to average over')
    attention = commands.add_parser('attention', help='the "attention" of the scans for a pixel')
    attention.set_defaults(draw=draw_attention)
    attention.add_argument('images', type=Path, metavar='image', help='an image')
    attention.add_argument('--layers', nargs='+', help='blocks, such as stages.2.blocks.1 or blocks.11')
    attention.add_argument(
        '--pixel', type=int, nargs=2, metavar=('X', 'Y'), help='of the image as it is drawn; default: centre'
    )
    attention.add_argument(
        '--whole', action='store_true', help='all of the image, its shorter side of --img-size, instead of a crop'
    )
    attention.add_argument('--class-token', action='store_true', help="of Vim's class token instead of a pixel")
    attention.add_argument('--channel', type=int, help='of this channel; default: the mean of all')
    attention.add_argument('--gamma', type=positive_float, default=0.5, help='draw (weight / largest) ** GAMMA')
    for command in (erf, attention):
        weights.add_spec_options(command)
        command.add_argument('--img-size', type=positive, help="side of the images; default: the model's own")
        command.add_argument('--output', type=Path, default=Path('views'), help='folder of the pictures')
        add_loader_options(command)
        weights.add_model_options(command)
    return parser.parse_args(argv)


@one_line_errors('visualize.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    console = Console()
    args.model = weights.spec_of(args.model, args.checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    args.draw(args, console)
    console.print(f'Pictures are in {args.output}/')


if __name__ == '__main__':
    main()
