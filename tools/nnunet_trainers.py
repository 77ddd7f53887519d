"""Prints the folder of the nnU-Net trainers of this library, for nnU-Net's variable of the environment.

export nnUNet_extTrainer="$(vmamba nnunet-trainers)"
nnUNetv2_train DATASET_ID 3d_fullres all -tr nnUNetTrainerUMambaBot
"""

import argparse
from importlib.util import find_spec
from typing import Optional, Sequence

from vmamba.nnunet import FOLDER
from vmamba.tools.user_errors import Parser, one_line_errors


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    return Parser(__doc__).parse_args(argv)


@one_line_errors('nnunet_trainers.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    parse_args(argv)
    if find_spec('nnunetv2') is None:
        raise ModuleNotFoundError("No module named 'nnunetv2'", name='nnunetv2')
    print(FOLDER)


if __name__ == '__main__':
    main()
