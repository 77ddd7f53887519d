"""Where the tools print."""

from rich.console import Console


def open_console(width: int) -> Console:
    """The terminal, or lines of this width where what is printed goes elsewhere."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
