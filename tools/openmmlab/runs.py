"""mmengine's runner with strict loading, and with errors that say what to correct instead of tracebacks."""

import os
import textwrap
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from vmamba.tools.user_errors import UserError

from .checkpoints import MAX_MESSAGE, load_weights, read_checkpoint
from .checks import absent, check_maps, unwrap
from .configs import leaves

WRONG = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)  # how wrong values fail
EMPTY = 'need at least one array to concatenate'  # how mmengine's data sets fail without images


@contextmanager
def building(what: str, *further: type) -> Iterator[None]:
    """Turns errors about wrong values, and further ones, into a UserError that names what was to be built."""
    try:
        yield
    except FileNotFoundError as error:
        raise (absent(error.filename) if error.filename else UserError(str(error))) from error
    except (*WRONG, *further) as error:
        reason = textwrap.shorten(f'{type(error).__name__}: {error}', MAX_MESSAGE, placeholder=' ...')
        raise UserError(f'{what} cannot be built: {reason}; correct the config, or --cfg-options') from error


@RUNNERS.register_module()
class StrictRunner(Runner):
    """A runner that loads a checkpoint completely, runs no code from it, and names the part of a config that is wrong.

    The config's `fresh` names modules that keep their initial weights when `load_from` has all the others.
    """

    build_train_loop = building('train_cfg')(Runner.build_train_loop)
    build_val_loop = building('val_cfg')(Runner.build_val_loop)
    build_test_loop = building('test_cfg')(Runner.build_test_loop)
    build_optim_wrapper = building('optim_wrapper')(Runner.build_optim_wrapper)
    build_param_scheduler = building('param_scheduler')(Runner.build_param_scheduler)
    _init_model_weights = building('the pretrained model', RuntimeError)(Runner._init_model_weights)

    @staticmethod
    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> DataLoader:
        where = ', '.join(sources(dataloader['dataset']))
        try:
            with building(f'the data loader of {where}'):
                loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        except UserError as error:
            if EMPTY not in str(error):
                raise
            loader = None
        if loader is None or len(loader.dataset) == 0:
            raise UserError(f"there is no image, or none with annotations of the config's classes, in {where}")
        return loader

    def build_model(self, model: Any) -> nn.Module:
        with building('model'):
            model = super().build_model(model)
        if not torch.cuda.is_available():  # SyncBatchNorm needs GPUs
            model = revert_sync_batchnorm(model)
        check_maps(unwrap(model))
        return model

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads all weights from a local file; the caller decides neither where to nor how strictly."""
        checkpoint = read_checkpoint(filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        try:
            load_weights(unwrap(self.model), checkpoint, filename, () if self._resume else self.cfg.get('fresh', ()))
        except UserError as error:
            if self._resume or not isinstance(self._train_loop, BaseLoop):  # a test has not built it
                raise
            raise UserError(
                f'{error}; --fresh MODULE re-initialises a module, such as a head with other classes'
            ) from error
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint


def sources(dataset: Dict[str, Any]) -> Iterator[str]:
    """The annotation files of a data set's config, or else its folders."""
    for leaf in leaves(dataset):
        names = [leaf['ann_file']] if leaf.get('ann_file') else leaf.get('data_prefix', {}).values()
        root = leaf.get('data_root') or ''
        yield from [os.path.join(root, name) for name in names] or [str(leaf.get('type'))]


def add_hook(cfg: Config, **hook: Any) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), hook]


def build_runner(cfg: Config) -> Runner:
    """The runner of a config: one that checks data and checkpoints, unless the config names its own.

    Raises:
        UserError: If the config asks for something that is not registered, or has wrong values.
    """
    add_hook(cfg, type='CheckHook')
    cfg.setdefault('runner_type', 'StrictRunner')
    with building('what the config describes'):
        return RUNNERS.build(cfg)
