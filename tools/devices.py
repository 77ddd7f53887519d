"""The device and the precision that a tool runs with."""

import argparse
from pathlib import Path

import torch

from vmamba.tools.user_errors import UserError

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}  # of --precision


def pick_device(name: str = '') -> torch.device:
    """'cpu', 'cuda', or '' for the GPU if there is one, else the CPU.

    Raises:
        UserError: If there is no such device.
    """
    available = torch.cuda.is_available()
    if name not in ('', 'cpu', 'cuda') or (name == 'cuda' and not available):
        reason = 'PyTorch finds no GPU' if name == 'cuda' else 'it must be cpu or cuda'
        raise UserError(f'cannot run on device {name!r}: {reason}')
    return torch.device(name or ('cuda' if available else 'cpu'))


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Adds --device, which `pick_device` reads."""
    parser.add_argument('--device', type=pick_device, default='', help='cpu or cuda; default: the GPU if there is one')


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in a precision, which fp32 leaves as it is."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != 'fp32')


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else "CPU"}, {torch.get_num_threads()} thread(s)'
