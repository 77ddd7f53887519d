"""Language models as tools take them on the command line: a folder or an id, and a precision."""

import argparse
from typing import Optional

import torch

from vmamba.sequence import LanguageModel
from vmamba.tools.devices import DTYPES
from vmamba.tools.user_errors import as_user_error


def add_precision_option(parser: argparse._ActionsContainer) -> None:
    """Adds --precision, which `load` reads."""
    parser.add_argument('--precision', choices=tuple(DTYPES), help='default: bf16 on a GPU, fp32 on a CPU')


def load(source: str, device: torch.device, precision: Optional[str]) -> LanguageModel:
    """A model in the precision to generate with.

    Raises:
        UserError: If it cannot be loaded.
    """
    precision = precision or ('bf16' if device.type == 'cuda' else 'fp32')
    with as_user_error():
        return LanguageModel.from_pretrained(source, device=device, dtype=DTYPES[precision])
