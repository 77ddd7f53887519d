"""The settings of a training run: a YAML file, the files that it builds on, and options of the command line."""

import argparse
import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar, Union

import yaml

from vmamba.configs import find_config
from vmamba.tools.user_errors import UserError, nearest

BASE_KEY = '_base_'
ConfigT = TypeVar('ConfigT')


class Range(NamedTuple):
    """Limits of a number, or of each number of a list."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: object) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below and math.isfinite(value)

    def __str__(self) -> str:
        words = {'at least': self.least, 'above': self.above, 'at most': self.most, 'below': self.below}
        return ' and '.join(f'{word} {limit:g}' for word, limit in words.items() if math.isfinite(limit))


POSITIVE, NOT_NEGATIVE, ABOVE_0 = Range(least=1), Range(least=0), Range(above=0)
PROBABILITY, SHARE, FRACTION = Range(least=0, most=1), Range(least=0, below=1), Range(above=0, below=1)
FACTOR, SEED = Range(above=0, most=1), Range(least=0, below=2**63)


def setting(default: Any, text: str, allowed: Union[Range, Sequence[Any], None] = None) -> Any:
    """A field with its help text and what it allows; a list or a dictionary is copied for each run."""
    kind = 'default_factory' if isinstance(default, (list, dict)) else 'default'
    value = default.copy if isinstance(default, (list, dict)) else default
    return dataclasses.field(**{kind: value}, metadata={'help': text, 'allowed': allowed})


@dataclasses.dataclass
class Config:
    """Every key of a configuration; each is also an option of the command line."""

    task: str = setting(
        'classification',
        'classification of images; language: predict the next byte; or sequence: classify symbols or numbers; keys '
        'that are about images then have no effect',
        ('classification', 'language', 'sequence'),
    )
    # Model
    model: str = setting(
        '', 'name of any timm model; language: a preset such as mambabyte_nano; sequence: a mixer such as mamba'
    )
    model_args: Dict[str, Any] = setting({}, 'arguments of the model')
    num_classes: Optional[int] = setting(None, 'default: those of the data', POSITIVE)
    in_chans: int = setting(3, 'channels of the images: 3, or 1 for grey', (1, 3))
    drop_path: Optional[float] = setting(None, 'rate of stochastic depth', SHARE)
    pretrained: bool = setting(False, 'start from published weights; a checkpoint takes precedence')
    checkpoint: Optional[str] = setting(None, 'start from the weights in this file; language: the folder of a model')
    new_head: bool = setting(False, 're-initialise the classifier if the weights have another number of classes')
    teacher: Optional[str] = setting(None, 'timm model to distil from')
    teacher_checkpoint: Optional[str] = setting(None, "file of the teacher's weights; default: the published ones")
    distill_weight: float = setting(1.0, 'weight of the distillation loss', NOT_NEGATIVE)
    distill_temperature: float = setting(1.0, 'temperature of the distillation loss', ABOVE_0)
    # Data
    data: str = setting(
        '', "a folder, a CSV file, timm's dataset name (hfds/..., tfds/..., wds/...), packaged/... or synthetic"
    )
    data_dir: Optional[str] = setting(None, 'folder or CSV file of the data; for named datasets, their folder')
    data_args: Dict[str, Any] = setting({}, "arguments of timm's create_dataset")
    seq_len: int = setting(1024, 'language: bytes of a window', POSITIVE)
    pack_documents: bool = setting(False, 'language: files are separate sequences, each from an empty state')
    carry_state: bool = setting(False, 'language: a window continues from the state after the one before it')
    train_split: str = setting('train', 'split to learn from')
    val_split: str = setting('validation', 'split to validate on')
    val_fraction: Optional[float] = setting(
        None,
        'share of each class to validate on, if the data has no validation split; default: 0.2; of the bytes: 0.05',
        FRACTION,
    )
    img_size: Optional[int] = setting(None, "side of the images, default: the model's", POSITIVE)
    batch_size: int = setting(128, 'images per process and step', POSITIVE)
    val_batch_size: Optional[int] = setting(None, 'default: batch_size', POSITIVE)
    workers: int = setting(4, 'loading processes of each process', NOT_NEGATIVE)
    drop_last: bool = setting(True, 'leave out the last, smaller batch of an epoch')
    cache: bool = setting(False, 'for small data: hold it on the device and augment it there, by crops and flips')
    skip_bad_images: bool = setting(False, 'skip unreadable images instead of stopping')
    synthetic_images: int = setting(1_281_167, 'images per epoch of synthetic data', POSITIVE)
    # Augmentation
    augment: bool = setting(True, 'false: only resize and crop as in validation')
    aug_repeats: int = setting(1, 'repeated augmentation: how often an image is repeated', POSITIVE)
    scale: List[float] = setting([0.08, 1.0], 'range of the area of random crops', FACTOR)
    ratio: List[float] = setting([3 / 4, 4 / 3], 'range of the aspect ratio of random crops', ABOVE_0)
    hflip: float = setting(0.5, 'probability of a horizontal flip', PROBABILITY)
    vflip: float = setting(0.0, 'probability of a vertical flip', PROBABILITY)
    color_jitter: float = setting(0.4, 'strength of colour jitter, where there is no auto_augment', NOT_NEGATIVE)
    auto_augment: Optional[str] = setting(None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    interpolation: str = setting(
        'random', 'of random crops', ('random', 'bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')
    )
    crop_pct: Optional[float] = setting(None, "share of the image that validation crops, default: the model's", FACTOR)
    reprob: float = setting(0.0, 'probability of random erasing', PROBABILITY)
    remode: str = setting('pixel', 'what erases: const, rand or pixel', ('const', 'rand', 'pixel'))
    mixup: float = setting(0.0, 'alpha of mixup', NOT_NEGATIVE)
    cutmix: float = setting(0.0, 'alpha of cutmix', NOT_NEGATIVE)
    mixup_prob: float = setting(1.0, 'probability of mixing a batch', PROBABILITY)
    mixup_switch_prob: float = setting(0.5, 'probability of cutmix where both are on', PROBABILITY)
    mixup_mode: str = setting('batch', 'batch, pair or elem', ('batch', 'pair', 'elem'))
    smoothing: float = setting(0.1, 'label smoothing', SHARE)
    # Optimisation
    opt: str = setting('adamw', "name of timm's optimizer")
    opt_args: Dict[str, Any] = setting({}, 'arguments of the optimizer')
    lr: Optional[float] = setting(None, 'peak learning rate, default: lr_base * images per update / 512', ABOVE_0)
    lr_base: float = setting(5e-4, 'peak learning rate for 512 images per update', ABOVE_0)
    weight_decay: float = setting(0.05, 'decay of the parameters that the model does not exempt', NOT_NEGATIVE)
    layer_decay: Optional[float] = setting(
        None, 'factor of the learning rate from layer to layer, to fine-tune', FACTOR
    )
    clip_grad: Optional[float] = setting(None, 'limit of the gradient', ABOVE_0)
    clip_mode: str = setting('norm', 'norm, value or agc', ('norm', 'value', 'agc'))
    accumulate: int = setting(1, 'steps per update', POSITIVE)
    epochs: int = setting(300, 'passes over the data', POSITIVE)
    sched: str = setting(
        'cosine',
        "name of timm's schedule",
        ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none'),
    )
    warmup_epochs: float = setting(20.0, 'epochs of rising learning rate, included in epochs', NOT_NEGATIVE)
    warmup_prefix: bool = setting(False, 'start the schedule after the warm-up instead of at the first epoch')
    warmup_lr: float = setting(1e-6, 'learning rate at the start', NOT_NEGATIVE)
    min_lr: float = setting(5e-6, 'learning rate at the end', NOT_NEGATIVE)
    ema_decay: Optional[float] = setting(None, 'decay of the moving average of the weights; default: no average', SHARE)
    ema_warmup: bool = setting(False, 'let the decay of the average rise to ema_decay, for short runs')
    # How it runs
    precision: Optional[str] = setting(
        None, 'fp32, bf16 or fp16 (with loss scaling); default: bf16 on a GPU, fp32 on a CPU', ('fp32', 'bf16', 'fp16')
    )
    compile: bool = setting(False, 'compile the model')
    channels_last: bool = setting(False, 'memory format of the images and convolutions')
    grad_checkpointing: bool = setting(False, 'less memory, more time')
    shard: bool = setting(False, 'shard the weights over the processes of torchrun (FSDP2) instead of copying them')
    device: str = setting('', 'cpu or cuda, default: the GPU if there is one')
    seed: int = setting(0, 'of the weights, the order, the augmentation and the mixing', SEED)
    # Records
    output: str = setting('', 'folder of the run, default: runs/NAME_OF_CONFIG')
    log: List[str] = setting(
        ['tensorboard'],
        'where metrics go besides epochs.csv: tensorboard, wandb; [] for nowhere',
        ('tensorboard', 'wandb'),
    )
    log_every: int = setting(50, 'updates between log lines', POSITIVE)
    checkpoint_every: int = setting(0, 'updates between checkpoints, besides those after each epoch', NOT_NEGATIVE)
    keep_checkpoints: int = setting(2, 'newest checkpoints to keep', POSITIVE)

    def settle(self) -> None:
        """Fills in what follows from other keys, and checks the values.

        Raises:
            UserError: If a value is wrong.
        """
        self.pretrained &= self.checkpoint is None
        if self.data and Path(self.data).exists():
            if self.data_dir is not None:
                raise UserError(f'data {self.data} and data_dir {self.data_dir} both name the data; leave one out')
            self.data, self.data_dir = '', self.data
        _check(self)


def fields_of(kind: type) -> Dict[str, dataclasses.Field]:
    """The keys of a class of configurations."""
    return {field.name: field for field in dataclasses.fields(kind)}


FIELDS = fields_of(Config)


def load_config(path: Path, overrides: Dict[str, Any], kind: Type[ConfigT] = Config) -> ConfigT:
    """Reads a file and the files that it builds on, then applies what the command line gives.

    Args:
        path: YAML file; its key `_base_` names a file, relative to it, whose keys it replaces.
        overrides: Values by key.
        kind: Class of the configuration, a dataclass of keys with `output` and a method `settle`.

    Raises:
        FileNotFoundError: If a file is missing; the message names the nearest.
        UserError: If a file is broken, or a key or value is wrong.
    """
    path = find_config(path)
    hints, values = typing.get_type_hints(kind), {}
    for source, content in [*_layers(path), ('the command line', overrides)]:
        for key, value in content.items():
            if key not in hints:
                raise UserError(f'{source} has an unknown key {key!r}{nearest(str(key), hints)}')
            values[key] = _convert(key, value, hints[key], source)
    config = kind(**values)
    config.output = config.output or f'runs/{path.stem}'
    config.settle()
    return config


def task_of(path: Path) -> Optional[str]:
    """The key `task` of a file or of those that it builds on; None without one, and for files that cannot be read.

    `load_config` names the errors of such files.
    """
    try:
        layers = _layers(find_config(path))
    except (FileNotFoundError, UserError):
        return None
    return next((content['task'] for _, content in reversed(layers) if 'task' in content), None)


def _layers(path: Path, seen: Sequence[Path] = ()) -> List[Tuple[Path, Dict[str, Any]]]:
    """The files that a file builds on and itself, each with its keys and values, which replace those before it."""
    if path.resolve() in seen:
        raise UserError(f'{path} builds on itself; change its {BASE_KEY}')
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise UserError(f'{path} must hold keys and values, found a {type(content).__name__}')
    base = content.pop(BASE_KEY, None)
    if not isinstance(base, (str, type(None))):
        raise UserError(f'{path}: {BASE_KEY} must name a file, got {base!r}')
    below = _layers(find_config(path.parent / base), [*seen, path.resolve()]) if base else []
    return [*below, (path, content)]


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


def _convert(key: str, value: Any, kind: Any, source: Union[str, Path]) -> Any:
    """The value as the key's type; YAML takes 1e-3 for a text, and 1 is a number of any kind."""
    arguments = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in arguments:
        return None
    kind = typing.get_origin(arguments[0]) or arguments[0]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is list and isinstance(value, list):
        (item_kind,) = typing.get_args(arguments[0])
        kinds = (int, float) if item_kind is float else item_kind
        if item_kind is not Any and not all(isinstance(item, kinds) for item in value):
            what = {str: 'texts', int: 'whole numbers', float: 'numbers'}[item_kind]
            raise UserError(f'{key} must be a list of {what}, {source} gives {value}')
        value = [float(item) for item in value] if item_kind is float else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f'{key} must be of type {kind.__name__}, {source} gives {value!r}')
    return value


def _check(config: Config) -> None:
    if not config.model:
        raise UserError("the configuration names no model; add 'model: vmamba_t'")
    check_values(config)
    for key in ('scale', 'ratio'):
        pair = getattr(config, key)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise UserError(f'{key} must be two numbers, the lower first, got {pair}')
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f'warmup_epochs {config.warmup_epochs:g} must be below epochs {config.epochs}: train longer, or without '
            'warm-up by --warmup-epochs 0'
        )
    mixes = config.mixup > 0 or config.cutmix > 0
    if mixes and config.batch_size % 2:
        raise UserError(
            f'mixup and cutmix pair the images of a batch: batch_size must be even, got {config.batch_size}'
        )
    if mixes and not config.drop_last:
        raise UserError('mixup and cutmix need whole batches: set drop_last to true, or mixup and cutmix to 0')
    if config.cache and (config.skip_bad_images or (config.augment and (config.auto_augment or config.color_jitter))):
        raise UserError('cache allows neither skip_bad_images nor auto_augment nor color_jitter: unset these, or cache')
    if config.shard and config.clip_grad is not None and config.clip_mode == 'agc':
        raise UserError('clip_mode agc takes norms of whole rows, which shard divides: choose norm or value')
    if config.ema_warmup and config.ema_decay is None:
        raise UserError('ema_warmup is of a moving average, but there is none: set ema_decay, such as 0.999')


def check_values(config: Any) -> None:
    """Raises UserError for a value that its key does not allow."""
    for key, field in fields_of(type(config)).items():
        value, allowed = getattr(config, key), field.metadata['allowed']
        for item in value if isinstance(value, list) else [value]:
            if allowed is None or item is None or item in allowed:
                continue
            if isinstance(allowed, Range):
                raise UserError(f'{key} must be {allowed}, got {value}')
            guess = nearest(item, allowed) if isinstance(item, str) else ''
            raise UserError(f'{key} must be one of {", ".join(map(str, allowed))}, got {item!r}{guess}')


def option_of(key: str) -> str:
    """The option of the command line for a key."""
    return f'--{key.replace("_", "-")}'


def add_options(parser: argparse._ActionsContainer, without: Sequence[str] = (), kind: type = Config) -> None:
    """Makes an option of every key, except some; one that is not given is absent from the result."""
    for name, field in fields_of(kind).items():
        if name in without:
            continue
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif field.type == List[str]:
            how = dict(nargs='*', metavar='NAME')
        else:
            parse = {str: str, Optional[str]: _parse_text}.get(field.type, parse_value)
            how = dict(type=parse, metavar='VALUE')
        parser.add_argument(option_of(name), default=argparse.SUPPRESS, help=field.metadata['help'], **how)
    if kind is Config:
        parser.add_argument(
            '--from-scratch', dest='pretrained', action='store_false', default=argparse.SUPPRESS, help='--no-pretrained'
        )


def _parse_text(text: str) -> Optional[str]:
    return None if text == 'null' else text


def parse_value(text: str) -> Any:
    """A YAML value, for argparse."""
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not valid YAML: {error}') from error
