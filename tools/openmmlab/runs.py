"""Configs, checkpoints and checks that the tools for mmdet and mmseg share.

mmengine's own way with files that do not fit is a line in the log, or a traceback; here it is a `UserError`.
"""

import textwrap
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from user_errors import UserError

import vmamba.mm  # noqa: F401 - registers the backbones; without compiled operators of mmcv, mmdet needs its stand-in

SCOPES = ('mmdet', 'mmseg')
IGNORED_LABEL = 255
MAX_NAMES = 5  # of classes in a message
MAX_MESSAGE = 800  # characters about weights that do not fit


def load_config(path: Path, options: Optional[Dict[str, Any]] = None) -> Config:
    """A config of mmdet or mmseg with the options of the command line.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it cannot be read, or is of neither library.
    """
    if not path.is_file():
        raise FileNotFoundError(2, 'no such file', str(path))
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options or {})
    except (SyntaxError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'{path} with these --cfg-options is no config: {error}') from error
    if cfg.get('default_scope') not in SCOPES:
        raise UserError(f'{path} has default_scope {cfg.get("default_scope")!r}, expected one of {", ".join(SCOPES)}')
    init_default_scope(cfg.default_scope)
    return cfg


def set_work_dir(cfg: Config, config: Path, work_dir: Optional[Path]) -> None:
    """The folder of logs and checkpoints: the option's, else the config's, else work_dirs/NAME."""
    if work_dir is not None or cfg.get('work_dir') is None:
        cfg.work_dir = str(work_dir or Path('work_dirs') / config.stem)


def join_processes(cfg: Config, launcher: str) -> None:
    """Lets the processes of a launcher work together, on CPUs where there are no GPUs."""
    cfg.launcher = launcher
    if launcher == 'pytorch' and not torch.cuda.is_available():  # mmengine's own start and wrapping need GPUs
        torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(broadcast_buffers=False, device_ids=None))


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a checkpoint file, without running any code that it may hold.

    Raises:
        UserError: If there is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f'there is no checkpoint {path}')
    try:
        with torch.serialization.safe_globals(harmless_types()):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a broken file makes the reader stumble over
        raise UserError(
            f'{path} is no checkpoint that can be read safely: {textwrap.shorten(str(error), 120)}'
        ) from error


def harmless_types() -> List[Any]:
    """What mmengine's checkpoints hold beside tensors: the log's numbers, in arrays of NumPy."""
    builders = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since NumPy 2
    named = [(builder, f'{module}.{builder.__name__}') for builder in builders for module in modules]
    dtypes = [type(np.dtype(code)) for code in '?bhilBHILefd']
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *named, (_statistics, 'builtins.getattr')]


def _statistics(owner: Any, name: str) -> Any:
    """The attribute of the log's class that its pickle names; of anything else there is none."""
    if owner is not HistoryBuffer:
        raise ValueError(f'a checkpoint may not ask for the attribute {name} of {owner}')
    return getattr(owner, name)


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], path: str) -> None:
    """Loads all weights of the model.

    Raises:
        UserError: If a weight is missing, unexpected or of another shape, with the first of their names.
    """
    try:
        load_state_dict(model, checkpoint.get('state_dict', checkpoint), strict=True)
    except RuntimeError as error:
        message = textwrap.shorten(str(error), MAX_MESSAGE, placeholder=' ...')
        raise UserError(f'{path} does not fit the config: {message}') from error


def shorten(names: Sequence[str]) -> str:
    return ', '.join(names[:MAX_NAMES]) + (', ...' if len(names) > MAX_NAMES else '')


@RUNNERS.register_module()
class StrictRunner(Runner):
    """A runner that loads a checkpoint whole or not at all, and runs no code from it."""

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads all weights from a local file; where to and how strictly is not for the caller to say."""
        checkpoint = read_checkpoint(filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        load_weights(self.model.module if is_model_wrapper(self.model) else self.model, checkpoint, filename)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def _init_model_weights(self) -> None:
        """Initialises the weights, from a pretrained backbone if the config names one."""
        try:
            super()._init_model_weights()
        except RuntimeError as error:  # the backbone's, which says what it could not fetch or what does not fit
            raise UserError(textwrap.shorten(str(error), MAX_MESSAGE, placeholder=' ...')) from error


@HOOKS.register_module()
class CheckHook(Hook):
    """Stops before the first step if the data are not there or their classes are not the model's."""

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        check_data(runner.train_loop.dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            check_data(runner.val_loop.dataloader.dataset, runner.model)

    def before_test(self, runner: Runner) -> None:
        check_data(runner.test_loop.dataloader.dataset, runner.model)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        for sample in data_batch['data_samples']:
            if 'gt_sem_seg' in sample:
                check_labels(sample, len(runner.train_loop.dataloader.dataset.metainfo['classes']))


def check_data(dataset: Any, model: nn.Module) -> None:
    """Checks that images and annotations are there and that the heads have as many classes as the data.

    Raises:
        UserError: If not.
    """
    for leaf in leaves(dataset):
        check_files(leaf)
        check_classes(leaf, model)


def leaves(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets under wrappers that repeat or join them."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from leaves(part)


def check_files(dataset: BaseDataset) -> None:
    for prefix in dataset.data_prefix.values():
        if prefix and '://' not in prefix and not Path(prefix).exists():
            raise FileNotFoundError(2, 'no such folder', prefix)
    if len(dataset) == 0:
        where = dataset.ann_file or ', '.join(map(str, dataset.data_prefix.values()))
        raise UserError(f"there is no image with annotations of the config's classes in {where}")


def check_classes(dataset: BaseDataset, model: nn.Module) -> None:
    classes = dataset.metainfo['classes']
    known = getattr(dataset, 'cat_ids', classes)  # what COCO's annotation file has of them
    if len(known) != len(classes):
        raise UserError(f'{dataset.ann_file} has {len(known)} of the {len(classes)} classes: {shorten(classes)}')
    for name, count in class_counts(model):
        if count != len(classes):
            raise UserError(
                f'{name} has num_classes {count}, but the data have {len(classes)} classes: {shorten(classes)}'
            )


def class_counts(model: nn.Module) -> Iterator[Tuple[str, int]]:
    """The heads of a model that have classes of the data, and how many."""
    for name, module in model.named_modules():
        parent, _, own = name.rpartition('.')
        if own.isdigit():
            own = parent.rpartition('.')[2]
        if own.endswith('head') and own != 'rpn_head' and isinstance(getattr(module, 'num_classes', None), int):
            yield name, module.num_classes


def check_labels(sample: Any, classes: int) -> None:
    labels = sample.gt_sem_seg.data
    wrong = labels[(labels != IGNORED_LABEL) & (labels >= classes)]
    if len(wrong):
        raise UserError(
            f'{sample.seg_map_path} has label {int(wrong.max())}, but the config has {classes} classes, from 0'
        )


def add_hook(cfg: Config, **hook: Any) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), hook]


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, one that checks data and checkpoints unless the config names its own.

    Raises:
        UserError: If the config asks for what is not registered, or with wrong values.
    """
    add_hook(cfg, type='CheckHook')
    cfg.setdefault('runner_type', 'StrictRunner')
    try:
        return RUNNERS.build(cfg)
    except (KeyError, ValueError) as error:
        raise UserError(f'what the config describes cannot be built: {error}') from error
