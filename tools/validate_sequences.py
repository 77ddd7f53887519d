"""Accuracy of a trained classifier of sequences on a split, or on fresh sequences of several lengths.

    vmamba validate-sequences runs/listops/best.pt --split test
    vmamba validate-sequences runs/induction_heads/best.pt --lengths 64 256 1024 1048576 --output lengths.csv

Sequences of `validation` and `test` are the same in every run.
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch.utils.data import Dataset, Subset

from vmamba.sequence import SequenceClassifier
from vmamba.tools.devices import add_device_option
from vmamba.tools.images.batches import hits
from vmamba.tools.output_files import write_csv
from vmamba.tools.sequences.tasks import FRESH, PREFIX, load_task
from vmamba.tools.training.sequences import load_classifier
from vmamba.tools.user_errors import Parser, UserError, file_name, one_line_errors, positive


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('checkpoint', type=Path, help='best.pt of a run of `vmamba train` with task: sequence')
    parser.add_argument('--split', default='validation', choices=('train', 'validation', 'test'))
    parser.add_argument('--lengths', type=positive, nargs='+', help='of fresh sequences; default: that of the run')
    parser.add_argument('--count', type=positive, help='sequences of each length; default: all of the split')
    parser.add_argument('--data-dir', help='folder of the data; default: that of the run')
    parser.add_argument('--positions', type=positive, default=2**18, help='of a batch: long sequences come alone')
    parser.add_argument('--output', type=file_name('.csv'), help='CSV file to write')
    add_device_option(parser)
    return parser.parse_args(argv)


@torch.inference_mode()
def accuracy(model: SequenceClassifier, data: Dataset, positions: int, device: torch.device) -> Dict[str, float]:
    """Length, number of answers and percentage of right ones.

    A batch has at most so many positions, but at least one sequence.
    """
    length, count = len(data[0][0]), len(data)
    batch_size = max(positions // length, 1)
    right, answers = torch.zeros((), dtype=torch.float64, device=device), 0
    for start in range(0, count, batch_size):
        examples = [data[index] for index in range(start, min(start + batch_size, count))]
        inputs = torch.stack([row for row, _ in examples]).to(device)
        targets = torch.stack([torch.as_tensor(target) for _, target in examples]).to(device).flatten()
        right += hits(model(inputs).flatten(0, -2).float(), targets)[:, 0].sum()
        answers += len(targets)
    return {'length': length, 'answers': answers, 'accuracy': 100 * right.item() / answers}


@one_line_errors('validate_sequences.py')
def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    model, facts = load_classifier(args.checkpoint)
    name, options = facts['data'].removeprefix(PREFIX), dict(facts['data_args'])
    if args.lengths and name not in FRESH:
        raise UserError(f'{facts["data"]} has sequences of one length: leave --lengths out')
    rows: List[Dict[str, Any]] = []
    for length in args.lengths or [None]:
        own = options if length is None else {**options, 'length': length}
        data = load_task(name, args.split, args.data_dir or facts['data_dir'], **own)
        if args.count:
            data = Subset(data, range(min(args.count, len(data))))
        rows.append(accuracy(model.to(args.device).eval(), data, args.positions, args.device))
        print('length {length}: {accuracy:.2f} % of {answers} answers'.format(**rows[-1]), flush=True)
        if args.output:  # now, since a greater length may not fit into the memory
            what = dict(checkpoint=str(args.checkpoint), model=facts['model'], data=facts['data'], split=args.split)
            write_csv(args.output, [{**what, **row} for row in rows])


if __name__ == '__main__':
    main()
