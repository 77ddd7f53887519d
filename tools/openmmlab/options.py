"""Options that the tools for mmdet and mmseg share; parsing them needs neither library."""

import argparse
import ast
from pathlib import Path
from typing import Any, Callable, Tuple


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The config and what overrides it."""
    parser.add_argument('config', type=Path, help='config file of mmdet or mmseg, or the name of an installed one')
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
        return key, ast.literal_eval(Words().visit(ast.parse(value, mode='eval')))
    except (SyntaxError, ValueError):
        return key, value


class Words(ast.NodeTransformer):
    """Makes literals of words without quotes: true, false and none in any case, as in mmengine's tools, and text."""

    KNOWN = {'true': True, 'false': False, 'none': None}

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(self.KNOWN.get(node.id.lower(), node.id))


def file_name(*suffixes: str) -> Callable[[str], Path]:
    """A reader, for argparse, of the name of a file to write that has one of these suffixes."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes or path.is_dir():
            raise argparse.ArgumentTypeError(f'must be a file that ends with {" or ".join(suffixes)}, got {text!r}')
        return path

    return read
