"""Configs of mmdet and mmseg with the options of a command line."""

import argparse
import ast
import inspect
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from yaml import YAMLError

import vmamba.mm  # noqa: F401 - registers the backbones; without mmcv's compiled operators, mmdet needs its stand-in
from vmamba.configs import find_config
from vmamba.tools.user_errors import UserError, nearest

SCOPES = ('mmdet', 'mmseg')
# What mmengine and the tools read from the top level of a config, in addition to the arguments of the runner.
FURTHER_KEYS = (
    'activation_checkpointing compile custom_imports efficient_conv_bn_eval find_unused_parameters fresh '
    'model_wrapper_cfg runner_type sync_bn tta_model tta_pipeline'
).split()
# Launchers, and the variable with a process's number.
RANKS = {'none': '', 'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


def load_config(path: Path, options: Optional[Dict[str, Any]] = None) -> Config:
    """A config of mmdet or mmseg with the options of the command line.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If its library is not installed.
        UserError: If it cannot be read, is of neither library, or lacks what an option changes.
    """
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
        check_keys(cfg, options or {})
        cfg.merge_from_dict(options or {})
    except (SyntaxError, KeyError, TypeError, IndexError, ValueError, YAMLError) as error:
        raise UserError(f'{path} with these --cfg-options is no config: {error}') from error
    if cfg.get('default_scope') not in SCOPES:
        raise UserError(f'{path} has default_scope {cfg.get("default_scope")!r}, expected one of {", ".join(SCOPES)}')
    import_module(cfg.default_scope)  # otherwise a missing package shows as a name that no registry knows
    init_default_scope(cfg.default_scope)
    return cfg


def check_keys(cfg: Config, options: Iterable[str]) -> None:
    """Refuses options for top-level keys that nothing reads, and warns of others that look misspelt.

    New keys below the top level are common. A class reports those that it does not take, a plain dictionary does not.
    """
    read = {*inspect.signature(Runner.__init__).parameters, *FURTHER_KEYS} - {'self', 'cfg'}
    for key in options:
        name = key.partition('.')[0]
        if name not in read and name not in cfg.keys():
            raise UserError(f'--cfg-options {key}: the config has no {name!r}{nearest(name, read)}')
        if name not in read:
            warning = f'has no effect where the config file has used {name} already: override these places'
        elif hint := hint_for(cfg, key):
            warning = f'is new in the config{hint}'
        else:
            continue
        print(f'--cfg-options {key} {warning}', file=sys.stderr)


def hint_for(cfg: Config, key: str) -> str:
    """'; did you mean ...?' for a key that the config lacks and that is like one that it has."""
    node: Any = cfg
    for name in key.split('.'):
        if isinstance(node, (list, tuple)):
            node = node[int(name)] if name.isdigit() and int(name) < len(node) else None
        elif isinstance(node, (dict, Config)):
            if name not in node.keys():
                return nearest(name, node.keys())
            node = node[name]
    return ''


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets, or the configs of them, inside wrappers that repeat or join them."""
    get = dataset.get if isinstance(dataset, dict) else partial(getattr, dataset)
    inner = get('datasets', None) or [get('dataset', None)]
    parts = [leaf for part in inner if part is not None for leaf in leaves(part)]
    yield from parts or [dataset]


def set_work_dir(cfg: Config, config: Path, work_dir: Optional[Path]) -> None:
    """The folder of logs and checkpoints: the option's, else the config's, else work_dirs/NAME."""
    if work_dir is not None or cfg.get('work_dir') is None:
        cfg.work_dir = str(work_dir or Path('work_dirs') / config.stem)


def join_processes(cfg: Config, launcher: str) -> None:
    """Sets the launcher. On CPUs it starts the process group here, since mmengine's own start needs GPUs."""
    cfg.launcher = launcher
    if launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(broadcast_buffers=False, device_ids=None))


def is_first_process(launcher: str) -> bool:
    """Whether this is the first process of a launcher; mmengine knows only after the runner is built."""
    return os.environ.get(RANKS[launcher], '0') == '0'


class Overrides(DictAction):
    """mmengine's KEY=VALUE; a value may also be any Python literal, or text with spaces, which mmengine would drop."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Sequence[str], option_string: Any = None
    ) -> None:
        for text in values:
            key, equals, value = text.partition('=')
            if not key or not equals:
                parser.error(f'{option_string}: expected KEY=VALUE, got {text!r}')
            try:
                value = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                if ' ' not in value or value[0] in '([':
                    try:
                        super().__call__(parser, namespace, [text])
                    except AssertionError as error:
                        parser.error(f'{option_string}: {error}')
                    continue
            setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), key: value})


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Overrides,
        metavar='KEY=VALUE',
        help="override the config's settings, such as optim_wrapper.optimizer.lr=1e-4 or model.backbone.with_cp=True",
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The config, what overrides it, and how several processes are started."""
    parser.add_argument('config', type=Path, help='config file of mmdet or mmseg, or the name of an installed one')
    add_overrides(parser)
    parser.add_argument('--launcher', choices=RANKS, default='none', help='pytorch under torchrun')
