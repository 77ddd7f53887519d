"""What the benchmarks report: tables on the terminal, CSV files, and sections of a Markdown file."""

import shlex
from math import floor, log10
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import pandas as pd
import timm
import torch

from vmamba.tools.benchmarks.timing import triton_version
from vmamba.tools.output_files import write_text

from rich.console import Console
from rich.table import Table


def versions() -> str:
    return f'torch {torch.__version__}, triton {triton_version()}, timm {timm.__version__}'


def command_of(tool: str, argv: Sequence[str], outputs: Sequence[str]) -> str:
    """The command line `vmamba TOOL ...`, without the options in `outputs`, which name the files that it writes."""
    kept, skip = [], False
    for argument in argv:
        if not skip and not argument.startswith(tuple(f'{output}=' for output in outputs)) and argument not in outputs:
            kept.append(argument)
        skip = argument in outputs
    return shlex.join(['vmamba', *tool.split(), *kept])


def number(value: Any) -> str:
    """Three significant digits of a float without exponent, '-' for nothing, and anything else as it is."""
    if value is None or (isinstance(value, float) and value != value):
        return '-'
    if not isinstance(value, float):
        return str(value)
    digits = 2 - floor(log10(abs(value))) if value else 0
    return f'{value:.{max(digits, 0)}f}'


class Report(NamedTuple):
    """One section of results.

    Attributes:
        name: Of the section in a Markdown file.
        title: Its heading.
        facts: Of the run, by name: the machine, versions, the command.
        tables: With their headers as columns; floats are shown with three digits.
        notes: How the figures were measured.
        messages: Of what failed.
        picture: File name of a picture beside the Markdown file; '' for none.
    """

    name: str
    title: str
    facts: Dict[str, str]
    tables: Sequence[pd.DataFrame]
    notes: str
    messages: Sequence[str] = ()
    picture: str = ''

    def print(self, console: Console) -> None:
        for i, table in enumerate(self.tables):
            heading = '\n'.join([self.title, *self.facts.values()]) if i == 0 else None
            shown = Table(title=heading)
            for name, values in table.items():
                shown.add_column(name, justify='right' if _is_numeric(values) else 'left', overflow='fold')
            for row in _cells(table):
                shown.add_row(*row)
            console.print(shown)
        for message in self.messages:
            console.print(message, markup=False, highlight=False)

    def write_section(self, path: Path) -> None:
        """Writes the section into a Markdown file, in the place of its old one, and leaves all else as it is.

        Without the file, makes it and its folder.
        """
        picture = f'![{self.title}]({self.picture})' if self.picture else ''
        facts, messages = ('\n'.join(f'- {line}' for line in lines) for lines in (self._facts(), self.messages))
        parts = f'## {self.title}', facts, picture, self.notes, *map(markdown_table, self.tables), messages
        text = path.read_text() if path.is_file() else '# Benchmarks\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, replace_section(text, self.name, '\n\n'.join(filter(None, parts))))

    def _facts(self) -> List[str]:
        return [f'{name}: `{fact}`' if name == 'command' else f'{name}: {fact}' for name, fact in self.facts.items()]


def write_records(records: Sequence[Dict[str, Any]], path: Path) -> None:
    """Writes a CSV file with a row for each record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, pd.DataFrame(records).to_csv(index=False))


def markdown_table(table: pd.DataFrame) -> str:
    """A table whose columns of numbers are aligned to the right."""
    rule = ['---:' if _is_numeric(values) else '---' for _, values in table.items()]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (list(table), rule, *_cells(table)))


def _is_numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values)


def _cells(table: pd.DataFrame) -> List[List[str]]:
    return [[number(value) for value in row] for row in table.itertuples(index=False)]


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
