"""The model that the exporting tools are given on the command line, and images to export it with."""

import argparse
import json
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from vmamba.export import FeatureMaps
from vmamba.tools import weights
from vmamba.tools.user_errors import Parser, UserError, at_least, file_name, positive


def make_parser(description: Optional[str], suffix: str) -> Parser:
    """A parser with the options that all formats have, for files with this suffix."""
    parser = Parser(description)
    parser.add_argument('model', type=weights.parse_spec, metavar='NAME[=FILE]', help=weights.SPEC_HELP)
    parser.add_argument('output', type=file_name(suffix), help=f'the {suffix} file to write')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights, such as best.pt of `vmamba train`')
    parser.add_argument('--num-classes', type=at_least(0), help="default: the weights'; 0: pooled features")
    parser.add_argument(
        '--img-size', type=positive, help="side of the images, the only one that the file takes; default: the model's"
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='take any number of images; default: one')
    parser.add_argument('--features', action='store_true', help='output the feature maps instead of logits')
    parser.add_argument(
        '--model-args', type=weights.parse_model_args, default={}, metavar='YAML', help="such as '{stride: 6}'"
    )
    parser.add_argument('--seed', type=int, default=0, help='of random weights, and of the images for the comparison')
    parser.add_argument('--force', action='store_true', help='overwrite the output')
    return parser


def parse(parser: Parser, argv: Optional[Sequence[str]]) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.output.exists() and not args.force:
        parser.error(f'{args.output} exists; --force overwrites it')
    if not args.output.absolute().parent.is_dir():
        parser.error(f'there is no folder {args.output.parent}')
    return args


def load(args: argparse.Namespace) -> Tuple[nn.Module, Tensor]:
    """The model in evaluation mode, and one random image.

    Raises:
        UserError: If the model is unknown, its weights do not fit, or it does not take images of this size.
    """
    extra = {} if args.num_classes is None else {'num_classes': args.num_classes}
    model = weights.load_model(weights.spec_of(args.model, args.checkpoint), args, **extra)
    size = args.img_size or weights.own_size(model)
    model = weights.at_size(model, size)
    channels = resolve_data_config(pretrained_cfg=model.pretrained_cfg)['input_size'][0]
    x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(args.seed))
    try:
        with torch.no_grad():
            model(x)
    except ValueError as error:
        raise UserError(f'--img-size {size}: {error}') from error
    return (FeatureMaps(model).eval() if args.features else model), x


def metadata(model: nn.Module) -> Dict[str, str]:
    """Preprocessing and class names as JSON, by timm's names."""
    model = model.model if isinstance(model, FeatureMaps) else model
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    facts = {key: config[key] for key in ('mean', 'std', 'interpolation', 'crop_pct')}
    if model.class_names:
        facts['class_names'] = model.class_names
    return {key: json.dumps(value) for key, value in facts.items()}
