"""Trainers of nnU-Net v2 with the networks of this library.

nnU-Net finds the trainers of `FOLDER` if the environment variable nnUNet_extTrainer names it. It imports all modules
there as top-level modules, so that they must not use relative imports.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
