"""Trains a classifier as a configuration says, on one device or, under torchrun, on many.

vmamba train mnist5k_vmamba_nano
vmamba train finetune --model vmamba_t --data my_photos
torchrun --nproc-per-node 8 -m vmamba.tools.train configs/classification/vmamba_t.yaml --data-dir imagenet --resume
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from torch.distributed.elastic.multiprocessing.errors import record
from vmamba.tools.training.config import FIELDS, add_options, load_config, option_of
from vmamba.tools.training.run import train
from vmamba.tools.user_errors import UserError, nearest, program


def parse_args(argv: Optional[List[str]] = None) -> Tuple[Path, bool, Dict[str, Any]]:
    """The configuration's file, whether to resume, and the values given by option."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument('config', type=Path, help='YAML file, or the name of an installed one, such as vmamba_t')
    parser.add_argument('--resume', action='store_true', help='continue from the latest checkpoint, if there is one')
    add_options(parser.add_argument_group('keys of the configuration'))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = map(option_of, (*FIELDS, 'resume'))
        parser.error(f'unknown option {unknown[0]!r}{nearest(unknown[0].split("=")[0], known)}')
    values = vars(args)
    return values.pop('config'), values.pop('resume'), values


@record
def main(argv: Optional[List[str]] = None) -> None:
    path, resume, overrides = parse_args(argv)
    try:
        train(load_config(path, overrides), resume)
    except UserError as error:
        rank = os.environ.get('RANK')
        place = f' [process {rank}]' if rank else ''
        print(f'{program("train.py")}: error:{place} {error}', file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == '__main__':
    main()
