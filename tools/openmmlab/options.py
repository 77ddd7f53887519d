"""Options that the tools for mmdet and mmseg share."""

import argparse
import ast
from pathlib import Path
from typing import Any, Sequence

from mmengine.config import DictAction

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


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
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='pytorch under torchrun')
