"""mmengine's runner with errors that say what to correct: what does not fit is a line in its log, or a traceback."""

import os
import textwrap
from contextlib import contextmanager
from typing import Any, Dict, Iterator

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader
from vmamba.tools.user_errors import UserError

from vmamba.mm.base import TimmBackbone

from .checkpoints import MAX_MESSAGE, load_weights, read_checkpoint, within
from .checks import absent, check_maps, unwrap
from .configs import leaf_configs

WRONG = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)  # what wrong values end in
EMPTY = 'need at least one array to concatenate'  # what mmengine's storing of no images ends in


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turns errors about values that a class does not take into one that names what was to be built."""
    try:
        yield
    except FileNotFoundError as error:
        raise (absent(error.filename) if error.filename else UserError(str(error))) from error
    except WRONG as error:
        reason = textwrap.shorten(f'{type(error).__name__}: {error}', MAX_MESSAGE, placeholder=' ...')
        raise UserError(f'{what} cannot be built: {reason}; correct the config, or --cfg-options') from error


@RUNNERS.register_module()
class StrictRunner(Runner):
    """A runner that loads a checkpoint whole, runs no code from it, and names the part of a config that is wrong.

    The config's `fresh` names modules that keep their initial weights when the others are loaded by `load_from`.
    """

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
        check_maps(unwrap(model))
        return model

    def build_train_loop(self, loop: Any) -> Any:
        with building('train_cfg'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: Any) -> Any:
        with building('val_cfg'):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: Any) -> Any:
        with building('test_cfg'):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        with building('optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with building('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Loads all weights from a local file; where to and how strictly is not for the caller to say."""
        checkpoint = read_checkpoint(filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        fresh = () if self._resume else self.cfg.get('fresh', ())
        try:
            load_weights(unwrap(self.model), checkpoint, filename, fresh)
        except UserError as error:
            if self._resume or not isinstance(self._train_loop, BaseLoop):  # for a test, it is not built
                raise
            raise UserError(
                f'{error}; --fresh MODULE lets a module start with new weights, such as a head of other classes'
            ) from error
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def _init_model_weights(self) -> None:
        """Initialises the weights that are not to be loaded, from a pretrained backbone if the config names one."""
        if self._load_from is not None:
            fresh = self.cfg.get('fresh', ())
            if self._resume or not fresh:
                return
            for name, module in unwrap(self.model).named_modules():
                if isinstance(module, TimmBackbone) and not within(name, fresh):
                    module.pretrained = False
        try:
            super()._init_model_weights()
        except RuntimeError as error:  # the backbone's, which says what it could not fetch or what does not fit
            raise UserError(textwrap.shorten(str(error), MAX_MESSAGE, placeholder=' ...')) from error


def sources(dataset: Dict[str, Any]) -> Iterator[str]:
    """The annotation files of a data set's config, or else its folders."""
    for leaf in leaf_configs(dataset):
        names = [leaf['ann_file']] if leaf.get('ann_file') else leaf.get('data_prefix', {}).values()
        root = leaf.get('data_root') or ''
        yield from [os.path.join(root, name) for name in names] or [str(leaf.get('type'))]


def add_hook(cfg: Config, **hook: Any) -> None:
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), hook]


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, one that checks data and checkpoints unless the config names its own.

    Raises:
        UserError: If the config asks for what is not registered, or with wrong values.
    """
    add_hook(cfg, type='CheckHook')
    cfg.setdefault('runner_type', 'StrictRunner')
    with building('what the config describes'):
        return RUNNERS.build(cfg)
