"""Where the tools print, and how they show numbers and tables."""

from math import floor, log10
from typing import Any, List, Mapping, Optional

import pandas as pd

from rich.console import Console
from rich.table import Table


def open_console(width: int = 120) -> Console:
    """The terminal, or lines of this width where what is printed goes elsewhere."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def number(value: Any, form: Optional[str] = None) -> str:
    """A float by its format, or with three significant digits; '-' for nothing, and anything else as it is."""
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return '-'
    if not isinstance(value, float):
        return str(value)
    digits = 2 - floor(log10(abs(value))) if value else 0
    return format(value, form or f'.{max(digits, 0)}f')


def cells_of(frame: pd.DataFrame, forms: Mapping[str, str] = {}) -> List[List[str]]:
    """The rows of a table as text, floats by the formats of their columns."""
    return [
        [number(value, forms.get(name)) for name, value in zip(frame, row)] for row in frame.itertuples(index=False)
    ]


def is_numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values)


def table_of(frame: pd.DataFrame, title: Optional[str] = None, forms: Mapping[str, str] = {}) -> Table:
    """A table for the terminal. Texts are folded, so that nothing is cut off; numbers are aligned to the right."""
    table = Table(title=title)
    for name, values in frame.items():
        table.add_column(name, justify='right' if is_numeric(values) else 'left', overflow='fold')
    for row in cells_of(frame, forms):
        table.add_row(*row)
    return table
