"""The device that a tool runs on."""

from pathlib import Path
from typing import Optional

import torch


def pick_device(name: Optional[str] = None) -> torch.device:
    """The named device, or the GPU if there is one, else the CPU."""
    return torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else "CPU"}, {torch.get_num_threads()} thread(s)'
