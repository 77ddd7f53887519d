"""Lists, shows and copies the configurations that are installed with the library.

vmamba configs list
vmamba configs show vmamba_t
vmamba configs copy mask-rcnn_vmamba-t_fpn_amp-1x_coco --output my_configs
"""

import argparse
import ast
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Iterator, Optional, Sequence

from vmamba.configs import FOLDER, config_files, find_config
from vmamba.tools.output_files import write_text
from vmamba.tools.training.config import BASE_KEY, read_yaml
from vmamba.tools.user_errors import Parser, UserError, one_line_errors


def bases(path: Path) -> Iterator[Path]:
    """The files that a configuration builds on, itself first; those of other packages are left out."""
    yield path
    if path.suffix == '.yaml':
        named = read_yaml(path).get(BASE_KEY, [])
    else:
        assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        named = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == BASE_KEY]
        named = named[0] if named else []
    for base in [named] if isinstance(named, str) else named:
        if '::' not in base:
            yield from bases((path.parent / base).resolve())


def copy(name: Path, output: Path) -> Sequence[Path]:
    """Copies a configuration and the files that it builds on; returns the copies, that of itself first.

    Raises:
        UserError: If a file of that name is there and differs.
    """
    path = find_config(name).resolve()
    copies = {file: output / file.relative_to(path.parent) for file in bases(path)}
    for file, target in copies.items():
        if target.exists() and target.read_bytes() != file.read_bytes():
            raise UserError(f'{target} exists and differs; remove it, or name another --output')
    for file, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, file.read_text())
    return list(copies.values())


def list_names(args: argparse.Namespace) -> None:
    found = {name: path for name, path in config_files().items() if fnmatchcase(name, args.pattern)}
    if not found:
        raise UserError(f'no configuration matches {args.pattern!r}')
    for name, path in found.items():
        print(f'{path.relative_to(FOLDER).parts[0]:<16}{name}')


def show(args: argparse.Namespace) -> None:
    print(find_config(args.name).read_text(), end='')


def copy_files(args: argparse.Namespace) -> None:
    for path in copy(args.name, args.output):
        print(f'Wrote {path}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar='list | show | copy')
    command = commands.add_parser('list', help='names of the configurations')
    command.add_argument('pattern', nargs='?', default='*', help="such as 'vim_*'")
    command.set_defaults(run=list_names)
    command = commands.add_parser('show', help='print a configuration')
    command.add_argument('name', type=Path)
    command.set_defaults(run=show)
    command = commands.add_parser('copy', help='copy a configuration and the files that it builds on, to change them')
    command.add_argument('name', type=Path)
    command.add_argument('--output', type=Path, default=Path('.'), help='folder to copy to')
    command.set_defaults(run=copy_files)
    return parser.parse_args(argv)


@one_line_errors('configurations.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    main()
