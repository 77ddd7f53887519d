"""Converts an official checkpoint, or one of `vmamba train`, to safetensors in this library's own layout.

vmamba convert vmamba_t vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_t.safetensors
vmamba convert vmamba_t runs/mine/best.pt mine.safetensors
vmamba convert vmamba_t mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth backbone.safetensors --num-classes 0
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
from safetensors.torch import save

import vmamba  # noqa: F401
from vmamba.models.trained import model_args
from vmamba.tools.output_files import write_atomically
from vmamba.tools.user_errors import Parser, as_user_error, file_name, one_line_errors
from vmamba.tools.weights import Spec, training_of


def convert(model: str, checkpoint: Path, output: Path, num_classes: Optional[int] = None) -> None:
    """Loads a checkpoint in any known layout into a timm model and writes the model's weights.

    The checkpoint has the variant's own number of classes, that of its run, or `num_classes`; 0 drops or does without a
    classifier.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        UserError: If the model is unknown, a weight is missing or of another shape, or the output cannot be written.
    """
    overlay: Dict[str, Any] = {'file': str(checkpoint)}
    args = _args_of_run(model, checkpoint)
    if num_classes is not None:
        args['num_classes'] = num_classes
    if args.get('num_classes'):
        overlay['num_classes'] = args['num_classes']  # so that a classifier that does not fit is an error
    with as_user_error('', RuntimeError, ValueError):
        built = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    state = {key: value.contiguous() for key, value in built.state_dict().items()}
    write_atomically(output, lambda file: file.write(save(state)))


def _args_of_run(model: str, checkpoint: Path) -> Dict[str, Any]:
    """The arguments of the model of a checkpoint that `vmamba train` wrote."""
    facts = training_of(Spec(model, str(checkpoint)))
    return {'num_classes': facts['num_classes'], **model_args(facts)} if facts else {}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('model', help='registered name, such as vmamba_t')
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('output', type=file_name('.safetensors'), help='the .safetensors file to write')
    parser.add_argument(
        '--num-classes', type=int, help="classes of the checkpoint (default: its run's, or the variant's own); 0: none"
    )
    parser.add_argument('--force', action='store_true', help='overwrite the output')
    args = parser.parse_args(argv)
    if args.output.exists() and not args.force:
        parser.error(f'{args.output} exists; --force overwrites it')
    return args


@one_line_errors('convert.py')
def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    convert(args.model, args.checkpoint, args.output, args.num_classes)
    print(f'Wrote {args.output} ({args.output.stat().st_size / 2**20:.1f} MiB)')


if __name__ == '__main__':
    main()
