"""What the benchmarks report: tables on the terminal, CSV files, and sections of a Markdown file."""

import shlex
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import pandas as pd
import timm
import torch

from vmamba.tools.benchmarks.timing import triton_version
from vmamba.tools.devices import device_name
from vmamba.tools.output_files import write_atomically, write_text
from vmamba.tools.terminal import cells_of, is_numeric, table_of

from rich.console import Console


def versions() -> str:
    return f'torch {torch.__version__}, triton {triton_version()}, timm {timm.__version__}'


def facts_of(device: torch.device, tool: str, arguments: Sequence[str]) -> Dict[str, str]:
    """The machine, versions and the command of a run of a tool, such as 'bench mm'."""
    command = shlex.join(['vmamba', *tool.split(), *arguments])
    return {'machine': device_name(device), 'versions': versions(), 'command': command}


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

    def publish(self, console: Console, docs: Optional[Path] = None, picture: Optional[Path] = None) -> None:
        """Prints the tables, and writes them and the picture into a Markdown file and beside it, if one is given."""
        for i, table in enumerate(self.tables):
            console.print(table_of(table, '\n'.join([self.title, *self.facts.values()]) if i == 0 else None))
        for message in self.messages:
            console.print(message, markup=False, highlight=False)
        if docs:
            self.write_section(docs)
            if self.picture and picture:
                write_atomically(docs.with_name(self.picture), lambda file: file.write(picture.read_bytes()))
            console.print(f'Wrote its section of {docs}')

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


def markdown_table(table: pd.DataFrame) -> str:
    """A table whose columns of numbers are aligned to the right."""
    rule = ['---:' if is_numeric(values) else '---' for _, values in table.items()]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (list(table), rule, *cells_of(table)))


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
