"""Models with weights, as the evaluating tools take them on the command line: NAME, NAME=FILE or NAME=untrained."""

import argparse
import copy
import math
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

import vmamba  # noqa: F401
from vmamba.models._isotropic import TokenModel
from vmamba.models._pretrained import is_download_error, read_checkpoint, read_file
from vmamba.models.trained import model_args, run_facts, set_preprocessing
from vmamba.tools import devices
from vmamba.tools.devices import DTYPES, add_device_option
from vmamba.tools.training.config import parse_value
from vmamba.tools.user_errors import UserError, as_user_error, nearest, positive_float

SPEC_HELP = (
    'NAME for the published weights (downloaded), NAME=FILE for a checkpoint, NAME=untrained for random ones, '
    'hf-hub:OWNER/NAME for a model of the Hugging Face Hub, local-dir:FOLDER for a copy of one'
)
_CLASSIFIERS = ('head.fc.weight', 'classifier.head.weight', 'head.weight', 'fc.weight', 'classifier.weight')
SOURCES = 'hf-hub:', 'local-dir:'
_EXPECTED = (OSError, RuntimeError, TypeError, ValueError)


class Spec(NamedTuple):
    """A model on the command line.

    Attributes:
        name: timm name, or where timm finds a model with its name: hf-hub:OWNER/NAME or local-dir:FOLDER.
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


def spec_of(model: Optional[Spec], checkpoint: Optional[Path]) -> Spec:
    """The model that is named by the options --model and --checkpoint.

    Raises:
        UserError: If both name weights, or the model is not named, or there is no such file.
    """
    name, weights, _ = model or Spec('')
    if checkpoint is not None:
        if weights:
            raise UserError(f'--model {model} and --checkpoint {checkpoint} both name weights')
        weights = str(checkpoint)
        if not checkpoint.is_file():
            raise UserError(f'there is no checkpoint {weights}')
    if not name:
        name = training_of(Spec('', weights)).get('model') if weights else None
        if name is None:
            raise UserError(f'{weights or "no model"}: name the model by --model, such as --model vmamba_t')
    return Spec(name, weights)


def add_spec_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `spec_of` reads."""
    help_text = f"{SPEC_HELP}; default: the checkpoint's"
    parser.add_argument('--model', type=parse_spec, metavar='NAME[=FILE]', help=help_text)
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights, such as best.pt of `vmamba train`')


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is needed to build a model and to preprocess its images."""
    group = parser.add_argument_group('model')
    group.add_argument('--model-args', type=parse_model_args, default={}, metavar='YAML', help="such as '{stride: 6}'")
    group.add_argument('--seed', type=int, default=0, help='of random weights')
    group.add_argument('--mean', type=float, nargs='+', help="of the images' channels; default: the model's own")
    group.add_argument('--std', type=positive_float, nargs='+', help="default: the model's own")
    group.add_argument('--interpolation', choices=('bilinear', 'bicubic', 'nearest'), help="default: the model's own")
    group.add_argument(
        '--crop-pct', type=positive_float, help="side of the crop over the resized side; default: the model's"
    )
    group.add_argument('--crop-mode', choices=('center', 'squash', 'border'), help="default: the model's own")
    add_device_option(group)


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """Adds the precision of a forward pass, which `autocast` reads."""
    parser.add_argument('--precision', choices=DTYPES, default='fp32', help='the lower ones by autocast')


def load_model(spec: Spec, args: argparse.Namespace, **extra: Any) -> nn.Module:
    """Builds a model with its weights, in evaluation mode on the CPU.

    A checkpoint of `vmamba train` holds the model's arguments, class names and preprocessing; the last goes into the
    model's `pretrained_cfg`. A model of the Hub has them there. `class_names` is None where the names are not those of
    the model's classes.

    Raises:
        UserError: If the model is unknown, or its weights are missing or do not fit.
    """
    if spec.name.startswith(SOURCES):
        return _load_saved(spec, {**args.model_args, **extra})
    if not timm.is_model(spec.name.split('.')[0]):
        raise UserError(f'unknown model {spec.name!r}{nearest(spec.name, timm.list_models())}')
    trained = training_of(spec)
    arguments = {**(model_args(trained) if trained else {}), **args.model_args, **extra}
    torch.manual_seed(args.seed)
    try:
        model = timm.create_model(spec.name, **_weight_args(spec, arguments)).eval()
    except _EXPECTED as error:
        local = '' if spec.weights else f'; for this tool: {spec}=FILE'
        raise UserError(f'{spec}: {error}{local}') from error
    set_preprocessing(model, trained, arguments.get('in_chans', 3))
    return _with_names(model, trained.get('class_names'))


def _with_names(model: nn.Module, names: Any) -> nn.Module:
    model.class_names = list(names) if names and len(names) == model.num_classes else None
    return model


def _load_saved(spec: Spec, arguments: Dict[str, Any]) -> nn.Module:
    """A model of the Hub or of a folder, as `vmamba push` writes it."""
    if spec.weights:
        raise UserError(f'{spec}: {spec.name} has its own weights; leave out ={spec.weights}')
    try:
        model = timm.create_model(spec.name, pretrained=True, **arguments).eval()
    except KeyError as error:
        raise UserError(f'{spec}: its config.json is not of a timm model: it has no {error}') from error
    except Exception as error:
        if isinstance(error, _EXPECTED) or is_download_error(error):
            raise UserError(f'{spec}: {error}') from error
        raise
    return _with_names(model, model.pretrained_cfg.get('label_names'))


def training_of(spec: Spec) -> Dict[str, Any]:
    """What a checkpoint of `vmamba train` stores about its model; empty for all other weights.

    Without a name in the spec, the checkpoint may be of any model.

    Raises:
        UserError: If the checkpoint is of another model, or cannot be read.
    """
    path = spec.like or spec.weights
    if not path or path == 'untrained':
        return {}
    with as_user_error(str(spec) if spec.name else ''):
        facts = run_facts(read_file(path))
    if spec.name and facts and facts['model'].split('.')[0] != spec.name.split('.')[0]:
        raise UserError(f'{spec}: the checkpoint is of {facts["model"]}: give {facts["model"]}={path}')
    return facts


def parse_model_args(text: str) -> Dict[str, Any]:
    found = parse_value(text)
    if not isinstance(found, dict):
        expected = "keys and values such as '{stride: 6, in_chans: 1}'"
        raise argparse.ArgumentTypeError(f'must be {expected}, got {text!r}')
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
    """The image size of a checkpoint of patch tokens, so that no position embedding is resized before it need be."""
    found = [value for key, value in checkpoint.items() if key.endswith('pos_embed')]
    if not found or not is_of_tokens(name):
        return {}
    side = math.isqrt(found[0].shape[1] - 1)
    embed = timm.create_model(name, device='meta', **arguments).patch_embed
    return {'img_size': embed.patch_size + (side - 1) * embed.stride} if side**2 == found[0].shape[1] - 1 else {}


def is_of_tokens(name: str) -> bool:
    """Whether a name is of a model of this library with patch tokens, such as Vim."""
    modules = [family.__module__.rpartition('.')[2] for family in TokenModel.__subclasses__()]
    return timm.models.is_model_in_modules(name.split('.')[0], modules)


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
    if isinstance(model, TokenModel):
        return model.patch_embed.img_size[0]
    return model.pretrained_cfg['input_size'][-1]


def at_size(model: nn.Module, size: int) -> nn.Module:
    """The model for square images of this side: itself, or a copy on the CPU whose position embedding is resized.

    A copy, because resizing what was resized before would lose detail; on the CPU, where timm's Swin makes new masks.

    Raises:
        UserError: If the model takes no such images.
    """
    fixed = isinstance(model, TokenModel) or model.pretrained_cfg.get('fixed_input_size', False)
    if size == own_size(model) or not fixed:
        return model
    if not hasattr(model, 'set_input_size'):
        raise UserError(f'{type(model).__name__} takes images of {own_size(model)} pixels only, not {size}')
    model = copy.deepcopy(model).cpu()
    with as_user_error(f'--img-size {size}'):
        model.set_input_size(img_size=(size, size))
    return model


def allow_any_size(model: nn.Module) -> bool:
    """Lets a model take images of any size, at each call another; returns whether it can."""
    if isinstance(model, TokenModel):
        model.patch_embed.dynamic_img_size = True
        return True
    return not model.pretrained_cfg.get('fixed_input_size', False)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The context of a forward pass with the device and the precision of the options."""
    return devices.autocast(args.device, args.precision)
