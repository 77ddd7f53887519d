"""The settings of a training run: a YAML file, the files that it builds on, and options of the command line."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import yaml
from vmamba.configs import find_config
from vmamba.tools.user_errors import UserError, nearest

from .limits import check_values

BASE_KEY = '_base_'


def _key(default: Any, text: str) -> Any:
    """A field with its help text; a list or a dictionary is copied for each run."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata={'help': text})
    return dataclasses.field(default=default, metadata={'help': text})


@dataclasses.dataclass
class Config:
    """Every key of a configuration; each is also an option of the command line."""

    # Model
    model: str = _key('', 'name of any timm model')
    model_args: Dict[str, Any] = _key({}, 'arguments of the model')
    num_classes: Optional[int] = _key(None, 'default: those of the data')
    in_chans: int = _key(3, 'channels of the images: 3, or 1 for grey')
    drop_path: Optional[float] = _key(None, 'rate of stochastic depth')
    pretrained: bool = _key(False, 'start from published weights')
    checkpoint: Optional[str] = _key(None, 'start from the weights in this file')
    new_head: bool = _key(False, 'start with a new classifier where the weights have another number of classes')
    teacher: Optional[str] = _key(None, 'timm model to distil from')
    teacher_checkpoint: Optional[str] = _key(None, "file of the teacher's weights; default: the published ones")
    distill_weight: float = _key(1.0, 'weight of the distillation loss')
    distill_temperature: float = _key(1.0, 'temperature of the distillation loss')
    # Data
    data: str = _key(
        '', "timm's dataset name ('' for a folder, hfds/..., tfds/..., wds/...), packaged/... or synthetic"
    )
    data_dir: Optional[str] = _key(None, 'folder of the data')
    data_args: Dict[str, Any] = _key({}, "arguments of timm's create_dataset")
    train_split: str = _key('train', 'split to learn from')
    val_split: str = _key('validation', 'split to validate on')
    img_size: Optional[int] = _key(None, "side of the images, default: the model's")
    batch_size: int = _key(128, 'images a process and step')
    val_batch_size: Optional[int] = _key(None, 'default: batch_size')
    workers: int = _key(4, 'loading processes of each process')
    drop_last: bool = _key(True, 'leave out the last, smaller batch of an epoch')
    skip_bad_images: bool = _key(False, 'replace unreadable images by their neighbours instead of stopping')
    synthetic_images: int = _key(1_281_167, 'images of an epoch of synthetic data')
    # Augmentation
    augment: bool = _key(True, 'without, images are only resized and cropped as in validation')
    aug_repeats: int = _key(1, 'repeated augmentation: times that an image follows itself')
    scale: List[float] = _key([0.08, 1.0], 'range of the area of random crops')
    ratio: List[float] = _key([3 / 4, 4 / 3], 'range of the aspect ratio of random crops')
    hflip: float = _key(0.5, 'probability of a horizontal flip')
    vflip: float = _key(0.0, 'probability of a vertical flip')
    color_jitter: float = _key(0.4, 'strength of colour jitter, where there is no auto_augment')
    auto_augment: Optional[str] = _key(None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    interpolation: str = _key('random', 'of random crops')
    crop_pct: Optional[float] = _key(None, "share of the image that validation crops, default: the model's")
    reprob: float = _key(0.0, 'probability of random erasing')
    remode: str = _key('pixel', 'what erases: const, rand or pixel')
    mixup: float = _key(0.0, 'alpha of mixup')
    cutmix: float = _key(0.0, 'alpha of cutmix')
    mixup_prob: float = _key(1.0, 'probability of mixing a batch')
    mixup_switch_prob: float = _key(0.5, 'probability of cutmix where both are on')
    mixup_mode: str = _key('batch', 'batch, pair or elem')
    smoothing: float = _key(0.1, 'label smoothing')
    # Optimisation
    opt: str = _key('adamw', "name of timm's optimizer")
    opt_args: Dict[str, Any] = _key({}, 'arguments of the optimizer')
    lr: Optional[float] = _key(None, 'peak learning rate, default: lr_base * images an update / 512')
    lr_base: float = _key(5e-4, 'peak learning rate for 512 images an update')
    weight_decay: float = _key(0.05, 'decay of the parameters that the model does not exempt')
    layer_decay: Optional[float] = _key(None, 'factor of the learning rate from layer to layer, for fine-tuning')
    clip_grad: Optional[float] = _key(None, 'limit of the gradient')
    clip_mode: str = _key('norm', 'norm, value or agc')
    accumulate: int = _key(1, 'steps an update')
    epochs: int = _key(300, 'passes over the data')
    sched: str = _key('cosine', "name of timm's schedule")
    warmup_epochs: float = _key(20.0, 'epochs of rising learning rate, among the epochs')
    warmup_prefix: bool = _key(False, 'begin the schedule after the warm-up, instead of at the first epoch')
    warmup_lr: float = _key(1e-6, 'learning rate at the start')
    min_lr: float = _key(5e-6, 'learning rate at the end')
    ema_decay: Optional[float] = _key(None, 'decay of the moving average of the weights; default: no average')
    ema_warmup: bool = _key(False, 'let the decay of the average rise to ema_decay, for short runs')
    # How it runs
    precision: Optional[str] = _key(
        None, 'fp32, bf16 or fp16 (with loss scaling); default: bf16 on a GPU, fp32 on a CPU'
    )
    compile: bool = _key(False, 'compile the model')
    channels_last: bool = _key(False, 'memory format of the images and convolutions')
    grad_checkpointing: bool = _key(False, 'less memory, more time')
    shard: bool = _key(False, 'share the weights out among the processes of torchrun (FSDP2) instead of copying them')
    device: str = _key('', 'cpu or cuda, default: the GPU if there is one')
    seed: int = _key(0, 'of the weights, the order, the augmentation and the mixing')
    # Records
    output: str = _key('', 'folder of the run, default: runs/NAME_OF_CONFIG')
    log_every: int = _key(50, 'updates between log lines')
    checkpoint_every: int = _key(0, 'updates between checkpoints; one is written after every epoch anyway')
    keep_checkpoints: int = _key(2, 'newest checkpoints to keep')


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_HINTS = typing.get_type_hints(Config)


def load_config(path: Path, overrides: Dict[str, Any]) -> Config:
    """Reads a file and the files that it builds on, then applies what the command line gives.

    Args:
        path: YAML file; its key `_base_` names a file, relative to it, whose keys it replaces.
        overrides: Values by key.

    Raises:
        UserError: If a file is missing or broken, or a key or value is wrong.
    """
    path = _find(path)
    values = {key: _convert(key, value, 'the command line') for key, value in overrides.items()}
    config = Config(**{**_read(path, []), **values})
    config.output = config.output or f'runs/{path.stem}'
    _check(config)
    return config


def _find(path: Path) -> Path:
    try:
        return find_config(path)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _read(path: Path, seen: List[Path]) -> Dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f'{path} builds on itself; change its {BASE_KEY}')
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise UserError(f'{path} must hold keys and values, found a {type(content).__name__}')
    base = content.pop(BASE_KEY, None)
    if not isinstance(base, (str, type(None))):
        raise UserError(f'{path}: {BASE_KEY} must name a file, got {base!r}')
    values = _read(_find(path.parent / base), [*seen, path.resolve()]) if base else {}
    for key, value in content.items():
        if key not in FIELDS:
            raise UserError(f'{path} has an unknown key {key!r}{nearest(str(key), FIELDS)}')
        values[key] = _convert(key, value, path)
    return values


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: If it cannot be read, or a mapping in it has a key twice.
    """
    try:
        return parse_yaml(path.read_text('utf-8'))
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text: {error.reason} at byte {error.start}') from error
    except ValueError as error:
        raise UserError(f'{path} is not valid YAML: {error}') from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: If it is not valid, or a mapping in it has a key twice; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        reason = f'{error.problem} in line {mark.line + 1}' if mark else ' '.join(str(error).split())
        raise ValueError(reason) from error


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, where YAML's own loader takes the last value."""

    def compose_mapping_node(self, anchor: Optional[str]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            name = key.tag, str(key.value)
            if name in keys:
                raise yaml.MarkedYAMLError(problem=f'the key {key.value!r} is there twice', problem_mark=key.start_mark)
            keys.add(name)
        return node


def _convert(key: str, value: Any, source: Union[str, Path]) -> Any:
    """The value as the key's type; YAML takes 1e-3 for a text, and 1 is a number of any kind."""
    kind = _HINTS[key]
    arguments = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in arguments:
        return None
    kind = typing.get_origin(arguments[0]) or arguments[0]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is list and isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
        value = [float(item) for item in value]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f'{key} must be of type {kind.__name__}, {source} gives {value!r}')
    return value


def _check(config: Config) -> None:
    if not config.model:
        raise UserError("the configuration names no model; add 'model: vmamba_t'")
    check_values(config)
    mixes = config.mixup > 0 or config.cutmix > 0
    if mixes and config.batch_size % 2:
        raise UserError(
            f'mixup and cutmix pair the images of a batch: batch_size must be even, got {config.batch_size}'
        )
    if mixes and not config.drop_last:
        raise UserError('mixup and cutmix need whole batches: set drop_last to true, or mixup and cutmix to 0')
    if config.shard and config.clip_grad is not None and config.clip_mode == 'agc':
        raise UserError('clip_mode agc takes norms of whole rows, which shard divides: choose norm or value')
    if config.ema_warmup and config.ema_decay is None:
        raise UserError('ema_warmup is of a moving average, but there is none: set ema_decay, such as 0.999')
    if config.pretrained and config.checkpoint:
        raise UserError(f'pretrained and checkpoint ({config.checkpoint}) exclude each other; leave one out')


def option_of(key: str) -> str:
    """The option of the command line for a key."""
    return f'--{key.replace("_", "-")}'


def add_options(parser: argparse.ArgumentParser) -> None:
    """Makes an option of every key; one that is not given is absent from the result."""
    for name, field in FIELDS.items():
        option, help_text = option_of(name), field.metadata['help']
        if field.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(option, action=action, default=argparse.SUPPRESS, help=help_text)
        else:
            kind = {str: str, Optional[str]: _parse_text}.get(field.type, _parse_value)
            parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=help_text, metavar='VALUE')


def _parse_text(text: str) -> Optional[str]:
    return None if text == 'null' else text


def _parse_value(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not valid YAML: {error}') from error
