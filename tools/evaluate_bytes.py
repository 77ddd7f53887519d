"""Bits per byte of files under a byte model.

vmamba bits-per-byte --model runs/mambabyte_nano/best --data book.txt --window 8192 --stride 4096
vmamba bits-per-byte --model runs/mambabyte_nano/best --data book.txt --window 8192 --carry-state
"""

import argparse
from typing import Optional, Sequence

from vmamba.sequence import ByteFiles, bits_per_byte
from vmamba.tools.devices import add_device_option
from vmamba.tools.language_models import add_precision_option, load
from vmamba.tools.output_files import write_csv
from vmamba.tools.user_errors import Parser, as_user_error, file_name, one_line_errors, positive


@one_line_errors('evaluate_bytes.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    with as_user_error():
        files = ByteFiles.find(args.data, args.pattern)
        model = load(args.model, args.device, args.precision)
        ids, _ = files.read(0, len(files))
        stride = args.stride or args.window
        bits = bits_per_byte(model, ids.to(args.device), args.window, stride, args.carry_state, args.batch_size)
    print(f'{bits:.4f} bits per byte, {len(files)} bytes of {len(files.parts)} file(s)')
    if args.output:
        found = dict(bits_per_byte=bits, bytes=len(files), window=args.window, stride=stride)
        write_csv(args.output, [dict(model=args.model, data=args.data, **found)])


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--model', required=True, help='folder, or id on the Hugging Face Hub')
    parser.add_argument('--data', required=True, help='file or folder')
    parser.add_argument('--pattern', default='*', help="of the names of the files in a folder, such as '*.py'")
    parser.add_argument('--window', type=positive, default=1024, help='bytes that pass the model at a time')
    parser.add_argument('--stride', type=positive, help='distance of windows; default: their length')
    parser.add_argument('--carry-state', action='store_true', help='continue from the state after the window before')
    parser.add_argument('--batch-size', type=positive, default=8, help='windows at a time')
    parser.add_argument('--output', type=file_name('.csv'), help='CSV file to write')
    add_device_option(parser)
    add_precision_option(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()
