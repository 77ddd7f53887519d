"""Sections that the tools write into Markdown files, between marker comments."""

import shlex
from pathlib import Path
from typing import Sequence

from vmamba.tools.output_files import write_text


def command_of(tool: str, argv: Sequence[str], outputs: Sequence[str]) -> str:
    """The command line `vmamba TOOL ...`, without the options in `outputs`, which name the files that it writes."""
    kept, skip = [], False
    for argument in argv:
        if not skip and not argument.startswith(tuple(f'{output}=' for output in outputs)) and argument not in outputs:
            kept.append(argument)
        skip = argument in outputs
    return shlex.join(['vmamba', *tool.split(), *kept])


def markdown_table(cells: Sequence[Sequence[str]], left: int) -> str:
    """A table with its header first; all columns but the first `left` ones are aligned to the right."""
    header, *rows = cells
    rule = ['---'] * left + ['---:'] * (len(header) - left)
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rule, *rows))


def write_section(path: Path, name: str, parts: Sequence[str]) -> None:
    """Writes a section of these paragraphs into a file, in the place of its old one, and leaves all else as it is.

    Without the file, makes it and its folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.is_file() else '# Benchmarks\n'
    write_text(path, replace_section(text, name, '\n\n'.join(parts)))


def replace_section(text: str, name: str, body: str) -> str:
    """The text with this body between the section's marker comments, at the end if it had none.

    Raises:
        ValueError: If only one of the markers is there.
    """
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if (begin in text) != (end in text):
        raise ValueError(f'found only one of {begin!r} and {end!r}')
    section = f'{begin}\n{body}\n{end}'
    if begin not in text:
        return f'{text.rstrip()}\n\n{section}\n'
    head, rest = text.split(begin, 1)
    return head + section + rest.split(end, 1)[1]
