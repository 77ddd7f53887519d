"""Trains a classifier, a language model or U-Mamba as a configuration says, on one device or, under torchrun, on many.

vmamba train mnist5k_vmamba_nano
vmamba train mambabyte_nano --data my_texts
vmamba train finetune --model vmamba_t --data my_photos
vmamba train umamba_bot_2d --data my_images --num-classes 3
torchrun --nproc-per-node 8 -m vmamba.tools.train configs/classification/vmamba_t.yaml --data-dir imagenet --resume
"""

import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from torch.distributed.elastic.multiprocessing.errors import record

from vmamba.tools.training.config import Config, add_options, load_config, task_of
from vmamba.tools.user_errors import Parser, one_line_errors


def config_class(path: Path) -> type:
    """The class of a configuration by its key `task`."""
    if task_of(path) == 'segmentation':
        from vmamba.tools.segmentation.config import Config as SegmentationConfig

        return SegmentationConfig
    return Config


def parse_args(argv: Optional[List[str]] = None) -> Tuple[Path, bool, Dict[str, Any]]:
    """The configuration's file, whether to resume, and the values given by option."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, usage='%(prog)s CONFIG [--resume] [--KEY VALUE ...]')
    parser.add_argument('config', type=Path, help='YAML file, or the name of an installed one, such as vmamba_t')
    parser.add_argument('--resume', action='store_true', help='continue from the latest checkpoint, if there is one')
    kind = config_class(Path(argv[0])) if argv and not argv[0].startswith('-') else Config
    add_options(parser.add_argument_group('keys of the configuration'), kind=kind)
    args = parser.parse_args(argv)
    values = vars(args)
    return values.pop('config'), values.pop('resume'), values


@record
@one_line_errors('train.py')
def main(argv: Optional[List[str]] = None) -> None:
    path, resume, overrides = parse_args(argv)
    kind = config_class(path)
    config = load_config(path, overrides, kind)
    if kind is Config:  # either needs packages that the other one does without
        from vmamba.tools.training.run import train
    else:
        from vmamba.tools.segmentation.run import train
    train(config, resume)


if __name__ == '__main__':
    main()
