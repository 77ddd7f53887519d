"""Options that the tools for mmdet and mmseg share; parsing them needs neither library."""

import argparse
import ast
from pathlib import Path
from typing import Any, Tuple


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The config and what overrides it."""
    parser.add_argument('config', type=Path, help='config file of mmdet or mmseg')
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=override,
        action=Overrides,
        metavar='KEY=VALUE',
        help="override the config's settings, such as optim_wrapper.optimizer.lr=1e-4 or model.backbone.with_cp=True",
    )


class Overrides(argparse.Action):
    """Collects the pairs of all uses of an option in a dictionary."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **dict(values)})


def override(text: str) -> Tuple[str, Any]:
    """The key and the value of KEY=VALUE; the value is a Python literal, or else text."""
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise argparse.ArgumentTypeError(f'expected KEY=VALUE, got {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value
