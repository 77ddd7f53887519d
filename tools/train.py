"""Trains a classifier or a language model as a configuration says, on one device or, under torchrun, on many.

vmamba train mnist5k_vmamba_nano
vmamba train mambabyte_nano --data my_texts
vmamba train finetune --model vmamba_t --data my_photos
torchrun --nproc-per-node 8 -m vmamba.tools.train configs/classification/vmamba_t.yaml --data-dir imagenet --resume
"""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from torch.distributed.elastic.multiprocessing.errors import record

from vmamba.tools.training.config import add_options, load_config
from vmamba.tools.training.run import train
from vmamba.tools.user_errors import Parser, one_line_errors


def parse_args(argv: Optional[List[str]] = None) -> Tuple[Path, bool, Dict[str, Any]]:
    """The configuration's file, whether to resume, and the values given by option."""
    parser = Parser(__doc__, usage='%(prog)s CONFIG [--resume] [--KEY VALUE ...]')
    parser.add_argument('config', type=Path, help='YAML file, or the name of an installed one, such as vmamba_t')
    parser.add_argument('--resume', action='store_true', help='continue from the latest checkpoint, if there is one')
    add_options(parser.add_argument_group('keys of the configuration'))
    args = parser.parse_args(argv)
    values = vars(args)
    return values.pop('config'), values.pop('resume'), values


@record
@one_line_errors('train.py')
def main(argv: Optional[List[str]] = None) -> None:
    path, resume, overrides = parse_args(argv)
    train(load_config(path, overrides), resume)


if __name__ == '__main__':
    main()
