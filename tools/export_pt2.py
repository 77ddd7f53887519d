"""Compiles a model ahead of time to a package that runs without Python code of the model (AOTInductor).

The package holds ordinary operators of PyTorch, and takes images of one size. It is run and compared with PyTorch. If
the outputs differ, no file is left and the exit code is 2. Needs a C++ compiler.

    vmamba export pt2 vmamba_t vmamba_t.pt2 --dynamic-batch
    python -c "import torch; model = torch._inductor.aoti_load_package('vmamba_t.pt2')"
"""

import argparse
import shutil
from typing import Optional, Sequence

from vmamba.export import export_pt2
from vmamba.tools import exporting
from vmamba.tools.devices import add_device_option
from vmamba.tools.user_errors import UserError, one_line_errors


@one_line_errors('export_pt2.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    if not shutil.which('g++') and not shutil.which('clang++'):
        raise UserError('there is no C++ compiler, which AOTInductor needs: install g++ or clang++')
    model, x = exporting.load(args)
    try:
        error = export_pt2(model.to(args.device), x.to(args.device), args.output, args.dynamic_batch, not args.kernels)
    except ValueError as problem:
        raise UserError(f'{args.model}: {problem}') from problem
    print(f'Wrote {args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, differs from PyTorch by {error:.1e}')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = exporting.make_parser(__doc__, '.pt2')
    parser.add_argument(
        '--kernels',
        action='store_true',
        help="keep the library's operators, and so its Triton kernels on a GPU: loading needs `import vmamba`",
    )
    add_device_option(parser)
    return exporting.parse(parser, argv)


if __name__ == '__main__':
    main()
