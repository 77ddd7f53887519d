"""Exports a model to ONNX: ordinary operators, no custom ones, no loops.

The file is checked, run by ONNX Runtime on the CPU and compared with PyTorch. If the outputs differ, no file is left
and the exit code is 2. It takes images of one size, and one image at a time unless --dynamic-batch is given. Its
metadata holds the preprocessing of the images and the names of the classes.

    vmamba export onnx vmamba_t vmamba_t.onnx
    vmamba export onnx vim_t vim_t.onnx --checkpoint runs/pets/best.pt --dynamic-batch
    vmamba export onnx vssd_t maps.onnx --features --img-size 512
"""

import argparse
from typing import Optional, Sequence

from vmamba.export import MIN_OPSET, export_onnx
from vmamba.tools import exporting
from vmamba.tools.user_errors import UserError, one_line_errors, positive


@one_line_errors('export_onnx.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    model, x = exporting.load(args)
    facts = exporting.metadata(model)
    if args.fp16:
        model, x = model.half(), x.half()
    try:
        file = export_onnx(model, x, args.output, args.dynamic_batch, args.opset, args.int8, facts)
    except ValueError as error:
        raise UserError(f'{args.model}: {error}') from error
    print(f'Wrote {args.output}: {file.size / 2**20:.1f} MiB, {file.size / file.weights:.2f} times the weights')
    print(f'{file.nodes} nodes, loaded in {file.load_s:.2f} s, differs from PyTorch by {file.error:.1e}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = exporting.make_parser(__doc__, '.onnx')
    parser.add_argument('--opset', type=positive, default=MIN_OPSET, help=f"of ONNX's operators, {MIN_OPSET} or later")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument('--fp16', action='store_true', help='weights, images and outputs in fp16; scans in fp32')
    precision.add_argument(
        '--int8', action='store_true', help='int8 weights of linear layers, whose inputs are quantised as they run'
    )
    return exporting.parse(parser, argv)


if __name__ == '__main__':
    main()
