"""Models with weights, as the evaluating tools take them on the command line: NAME, NAME=FILE or NAME=untrained."""

import argparse
import copy
import math
from typing import Any, Dict, NamedTuple, Optional

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from vmamba.tools.training.checkpoint import BROKEN
from vmamba.tools.training.config import Config, parse_yaml
from vmamba.tools.training.setup import data_config_of
from vmamba.tools.user_errors import UserError, nearest, positive_float

import vmamba  # noqa: F401
from vmamba.models._pretrained import read_checkpoint
from vmamba.models.vim import Vim

SPEC_HELP = 'NAME for the published weights (downloaded), NAME=FILE for a checkpoint, NAME=untrained for fresh ones'
_CLASSIFIERS = ('head.fc.weight', 'classifier.head.weight', 'head.weight', 'fc.weight', 'classifier.weight')
_PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_EXPECTED = (OSError, RuntimeError, TypeError, ValueError)


class Spec(NamedTuple):
    """A model on the command line.

    Attributes:
        name: timm name.
        weights: '' for the published weights, 'untrained', or a file.
        like: Where untrained, a checkpoint: the model is built as for its weights.
    """

    name: str
    weights: str = ''
    like: str = ''

    def __str__(self) -> str:
        return f'{self.name}={self.weights}' if self.weights else self.name

    def untrained(self) -> 'Spec':
        return self if self.weights == 'untrained' else Spec(self.name, 'untrained', self.weights)


def parse_spec(text: str) -> Spec:
    name, _, weights = text.partition('=')
    return Spec(name, weights)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is needed to build a model and to preprocess its images."""
    group = parser.add_argument_group('model')
    group.add_argument('--model-args', type=_model_args, default={}, metavar='YAML', help="such as '{stride: 6}'")
    group.add_argument('--seed', type=int, default=0, help='of untrained weights')
    group.add_argument('--mean', type=float, nargs='+', help="of the images' channels; default: the model's own")
    group.add_argument('--std', type=positive_float, nargs='+', help="default: the model's own")
    group.add_argument('--interpolation', choices=('bilinear', 'bicubic', 'nearest'), help="default: the model's own")
    group.add_argument(
        '--crop-pct', type=positive_float, help="side of the crop over the resized side; default: the model's"
    )
    group.add_argument('--crop-mode', choices=('center', 'squash', 'border'), help="default: the model's own")
    group.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """Adds the precision of a forward pass, which `amp_dtype` reads."""
    parser.add_argument('--precision', choices=_PRECISIONS, default='fp32', help='the lower ones by autocast')


def load_model(spec: Spec, args: argparse.Namespace, **extra: Any) -> nn.Module:
    """Builds a model with its weights, in evaluation mode on the CPU.

    A checkpoint of tools/train.py tells the model's arguments and how its images are preprocessed, which goes into the
    model's `pretrained_cfg`.

    Args:
        spec: What to load.
        args: With the options of `add_model_options`.
        **extra: More arguments of the model.

    Raises:
        UserError: If the model is unknown, or its weights are missing or do not fit.
    """
    if not timm.is_model(spec.name.split('.')[0]):
        raise UserError(f'unknown model {spec.name!r}{nearest(spec.name, timm.list_models())}')
    trained = training_of(spec)
    arguments = {**_trained_args(trained), **args.model_args, **extra}
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(spec.name, **_weight_args(spec, arguments)).eval()
    except _EXPECTED as error:
        local = '' if spec.weights else f'; for this tool: {spec}=FILE'
        raise UserError(f'{spec}: {error}{local}') from error
    model.pretrained_cfg = {**model.pretrained_cfg, **_preprocessing(model, arguments.get('in_chans', 3), trained)}
    return model


def training_of(spec: Spec) -> Dict[str, Any]:
    """The configuration in a checkpoint of tools/train.py; nothing for all other weights.

    Without a name in the spec, the checkpoint may be of any model.

    Raises:
        UserError: If the checkpoint is of another model.
    """
    try:
        content = torch.load(spec.like or spec.weights, map_location='cpu', weights_only=True, mmap=True)
        config = content['config']
        model, _, _ = config['model'], config['model_args'], config['in_chans']
    except (*BROKEN, TypeError):  # no file, or not one of train.py's: `read_checkpoint` judges it
        return {}
    if spec.name and model.split('.')[0] != spec.name.split('.')[0]:
        raise UserError(f'{spec}: the checkpoint is of {model}: give {model}={spec.like or spec.weights}')
    return config


def _trained_args(trained: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments with which tools/train.py built a model."""
    if not trained:
        return {}
    sized = trained.get('img_size') and timm.get_pretrained_cfg(trained['model']).fixed_input_size
    size = {'img_size': trained['img_size']} if sized else {}
    return {'in_chans': trained['in_chans'], **size, **trained['model_args']}


def _preprocessing(model: nn.Module, chans: int, trained: Dict[str, Any]) -> Dict[str, Any]:
    """How tools/train.py preprocesses a model's images to validate: by the checkpoint's word, else by the same rules.

    So one model is never normalised in two ways.
    """
    config = Config(in_chans=chans, img_size=trained.get('img_size'), crop_pct=trained.get('crop_pct'))
    rules = data_config_of(config, model)
    if 'mean' not in trained or chans != trained['in_chans']:
        return rules
    said = {key: trained[key] for key in ('interpolation', 'crop_mode') if key in trained}
    return {**rules, **said, 'mean': tuple(trained['mean']), 'std': tuple(trained['std'])}


def _model_args(text: str) -> Dict[str, Any]:
    try:
        found, why = parse_yaml(text), ''
    except ValueError as error:
        found, why = None, f' ({error})'
    if not isinstance(found, dict):
        expected = "keys and values such as '{stride: 6, in_chans: 1}'"
        raise argparse.ArgumentTypeError(f'must be {expected}, got {text!r}{why}')
    return found


def _weight_args(spec: Spec, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments and those that choose the weights."""
    if spec.weights == 'untrained':
        return {**_size_of(read_checkpoint(spec.like), spec.name, arguments), **arguments} if spec.like else arguments
    cfg = timm.get_pretrained_cfg(spec.name)
    if not spec.weights:
        if cfg is None or not cfg.has_weights:
            raise UserError(
                f'{spec.name} has no published weights: give a checkpoint, {spec.name}=FILE, or {spec.name}=untrained'
            )
        return {'pretrained': True, **arguments}
    checkpoint = read_checkpoint(spec.weights)
    arguments = {'num_classes': _classes_of(checkpoint), **_size_of(checkpoint, spec.name, arguments), **arguments}
    overlay: Dict[str, Any] = {'file': spec.weights}
    if arguments['num_classes']:
        overlay['num_classes'] = arguments['num_classes']  # so that another classifier is an error, not replaced
    return {'pretrained': True, 'pretrained_cfg_overlay': overlay, **arguments}


def _classes_of(checkpoint: Dict[str, Tensor]) -> int:
    """Classes of a checkpoint's classifier; 0 if it has none."""
    found = [key for name in _CLASSIFIERS for key in checkpoint if key == name or key.endswith(f'.{name}')]
    return checkpoint[found[0]].shape[0] if found else 0


def _size_of(checkpoint: Dict[str, Tensor], name: str, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """The image size of a checkpoint of Vim, so that no position embedding is resized before it need be."""
    found = [value for key, value in checkpoint.items() if key.endswith('pos_embed')]
    if not found or not is_vim(name):
        return {}
    side = math.isqrt(found[0].shape[1] - 1)
    embed = timm.create_model(name, device='meta', **arguments).patch_embed
    return {'img_size': embed.patch_size + (side - 1) * embed.stride} if side**2 == found[0].shape[1] - 1 else {}


def is_vim(name: str) -> bool:
    return timm.models.is_model_in_modules(name.split('.')[0], [Vim.__module__.rpartition('.')[2]])


def data_config(model: nn.Module, args: argparse.Namespace, size: Optional[int] = None) -> Dict[str, Any]:
    """The model's own preprocessing (timm's names) at a size, with what the options say otherwise."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    chans, *side = config['input_size']
    config['input_size'] = (chans, size, size) if size else (chans, *side)
    for key in ('mean', 'std'):
        values = getattr(args, key)
        if values and len(values) not in (1, chans):
            raise UserError(f'--{key} needs 1 or {chans} values, got {len(values)}')
        config[key] = tuple(values) * (chans // len(values)) if values else config[key]
    for key in ('interpolation', 'crop_pct', 'crop_mode'):
        config[key] = getattr(args, key) or config[key]
    return config


def own_size(model: nn.Module) -> int:
    """Side of the images that the model is made for."""
    if isinstance(model, Vim):
        return model.patch_embed.img_size[0]
    return model.pretrained_cfg['input_size'][-1]


def at_size(model: nn.Module, size: int) -> nn.Module:
    """The model for square images of this side: itself, or a copy whose position embedding is resized.

    A copy, because resizing what was resized before would lose detail.

    Raises:
        UserError: If the model takes no such images.
    """
    fixed = isinstance(model, Vim) or model.pretrained_cfg.get('fixed_input_size', False)
    if size == own_size(model) or not fixed:
        return model
    if not hasattr(model, 'set_input_size'):
        raise UserError(f'{type(model).__name__} takes images of {own_size(model)} pixels only, not {size}')
    model = copy.deepcopy(model)
    try:
        model.set_input_size(img_size=(size, size))
    except _EXPECTED as error:
        raise UserError(f'--img-size {size}: {error}') from error
    return model


def any_size_args(name: str) -> Dict[str, Any]:
    """Arguments with which a model takes images of any size, at each call another."""
    return {'dynamic_img_size': True} if is_vim(name) else {}


def amp_dtype(args: argparse.Namespace) -> Optional[torch.dtype]:
    """What autocast lowers to; None for no autocast."""
    return _PRECISIONS[args.precision]
