"""Times the operators and the models that run on them: forward, backward, CUDA graphs, memory, and the host.

vmamba bench kernels --output kernels.csv --docs docs/benchmarks.md
vmamba bench kernels --only model --models vmamba_t --case '*_training'
vmamba bench kernels --only scan --case '*_n16_*'
vmamba bench kernels --only host --repeats 100
vmamba bench kernels --only host --device cpu --repeats 9
"""

import argparse
import statistics
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
from torch import Tensor

from vmamba.tools.benchmarks import cases
from vmamba.tools.benchmarks.cases import INFERENCE, KERNELS, KINDS, TRAINING, Case, Workload
from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.timing import (
    capture,
    is_out_of_memory,
    measure_ceilings,
    median_ms,
    peak_mib,
    settled_memory,
    wall_ms,
)
from vmamba.tools.devices import add_device_option
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive

from rich.progress import track

MODELS = ('vmamba_t', 'vim_t', 'swin_tiny_patch4_window7_224', 'convnext_tiny')
WIDTH = 200  # of the tables where there is no terminal
TURN = 10  # counted passes of a model before the next one takes its turn

TITLES = {
    'scan': 'Selective scan',
    'ssd': 'Scan of Mamba-2 (SSD)',
    'ss2d': 'SS2D core',
    'moe': 'Mixture of experts',
    'model': 'Models at 224x224, bf16 autocast',
    'host': 'Host time of eager training, bf16 autocast',
}
KERNEL_NOTES = """\
Medians of CUDA events, in milliseconds and bf16; "graph" is the replay of a CUDA graph. The forward pass runs without
gradients; the backward pass is timed alone, again and again after one forward pass, or where that cannot be done it is
forward + backward less forward. Peaks are those of PyTorch's allocator, inputs and gradients included. The floor is the
time of the fewest bytes at the speed of a copy: inputs read once and the output written once; for the backward pass
inputs and the output's gradient read once and a gradient of each input written once. Inputs that fit the cache are
found there, so that small cases may take less than the floor."""
MODEL_NOTES = """\
Medians of CUDA events; "graph" is the replay of a CUDA graph. Training is the forward and the backward pass. Peaks are
those of PyTorch's allocator, parameters, images and gradients included."""
HOST_NOTES = """\
Medians of milliseconds on the host's clock, of the forward and of the backward pass apart, each from one
synchronisation of the device to the next. The models take turns of ten passes in one process, so that drift of the
machine hits all alike; the pass before them, after another model's turn, is not counted. Above 1, the model is slower
than the one beside it."""
NOTES = {**dict.fromkeys(KERNELS, KERNEL_NOTES), 'model': MODEL_NOTES, 'host': HOST_NOTES}
# Columns of the tables: key of the record and header.
_CASE = {'case': 'case', 'by': 'by', 'batch': 'batch', 'shape': 'shape'}
COLUMNS = {
    'kernel': {
        **_CASE,
        'forward_ms': 'forward',
        'forward_graph_ms': 'forward, graph',
        'backward_ms': 'backward',
        'both_ms': 'both',
        'both_graph_ms': 'both, graph',
        'forward_peak_mib': 'peak MiB',
        'training_peak_mib': 'peak MiB, training',
        'forward_floor': 'floor / forward',
        'backward_floor': 'floor / backward',
    },
    'model': {
        **_CASE,
        'images_per_second': 'images/s',
        'graph_images_per_second': 'images/s, graph',
        'ms': 'ms',
        'peak_mib': 'peak MiB',
    },
    'host': {**_CASE, 'forward_ms': 'forward, ms', 'backward_ms': 'backward, ms'},
}
Record = Dict[str, Any]


def measure(case: Case, device: torch.device, repeats: int) -> Record:
    """Measures a case; whatever goes wrong is its status, beside what was measured before."""
    record = _record(case)
    with _noted(record):
        _measure(case, record, device, repeats)
    if case.compile:
        torch.compiler.reset()  # the next model shall not count as a recompilation of this one
    return record


def _record(case: Case) -> Record:
    return dict(case=case.name, kind=case.kind, by=case.by, batch=case.batch, shape=case.shape, status='ok', message='')


@contextmanager
def _noted(record: Record) -> Iterator[None]:
    """Ends what goes wrong inside by a note in the record."""
    try:
        yield
    except Exception as error:
        record['status'] = 'OOM' if is_out_of_memory(error) else 'failed'
        record['message'] = (str(error).strip().splitlines() or [type(error).__name__])[0]


def _measure(case: Case, record: Record, device: torch.device, repeats: int) -> None:
    """Memory first, before a graph holds any, then times; each number is kept as soon as it is there."""
    baseline = settled_memory(device)
    workload = case.workload(device)
    forward, both = torch.no_grad()(workload.forward), partial(_forward_backward, workload)
    on_gpu = device.type == 'cuda'
    if INFERENCE in case.passes:
        forward()  # compiles
        record['forward_peak_mib'] = peak_mib(forward, device, baseline)
        record['forward_ms'] = median_ms(forward, device, repeats)
    if TRAINING in case.passes:
        both()
        record['training_peak_mib'] = peak_mib(both, device, baseline)
        record['both_ms'] = median_ms(both, device, repeats)
    if case.kind in KERNELS:
        record['backward_ms'] = _backward_ms(workload, record, device, repeats)
    if on_gpu and INFERENCE in case.passes:
        record['forward_graph_ms'] = median_ms(capture(forward), device, repeats)
    if on_gpu and TRAINING in case.passes:
        record['both_graph_ms'] = median_ms(capture(both), device, repeats)


def _forward_backward(workload: Workload) -> Tuple[Optional[Tensor], ...]:
    y = workload.forward()
    return torch.autograd.grad(y, workload.inputs, torch.ones_like(y), allow_unused=True)


def _backward_ms(workload: Workload, record: Record, device: torch.device, repeats: int) -> float:
    """Times the backward pass alone, again and again after one forward pass, or takes the difference if it cannot."""
    y = workload.forward()
    grad = torch.ones_like(y)
    try:
        backward = partial(torch.autograd.grad, y, workload.inputs, grad, retain_graph=True, allow_unused=True)
        return median_ms(backward, device, repeats)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a graph that does not survive its backward pass
        return record['both_ms'] - record['forward_ms']


def measure_in_turn(cases: Sequence[Case], device: torch.device, repeats: int) -> List[Record]:
    """Measures the forward and the backward pass of all models, which take turns of several passes in a row.

    The first pass of a turn finds the caches of the processor full of another model, the first round compiles: neither
    is counted.
    """
    records = [_record(case) for case in cases]
    workloads: List[Optional[Workload]] = [None] * len(cases)
    times: List[List[Tuple[float, float]]] = [[] for _ in cases]
    for i, case in enumerate(cases):
        with _noted(records[i]):
            workloads[i] = case.workload(device)
    passes = min(TURN, repeats)
    for _ in range(1 + -(-repeats // passes)):
        for workload, own, record in zip(workloads, times, records):
            if record['status'] == 'ok':
                with _noted(record):
                    own += [_wall_times(workload, device) for _ in range(1 + passes)][1:]
    totals = {}
    for case, own, record in zip(cases, times, records):
        if record['status'] == 'ok':
            record['forward_ms'], record['backward_ms'] = map(statistics.median, zip(*own[-repeats:]))
            totals[case.name.removeprefix('host_')] = record['forward_ms'] + record['backward_ms']
    for case, record in zip(cases, records):
        total = totals.get(case.name.removeprefix('host_'))
        record.update({f'over {peer}': total / totals[peer] for peer in case.beside if total and peer in totals})
    return records


def _wall_times(workload: Workload, device: torch.device) -> Tuple[float, float]:
    """Milliseconds of a forward and of a backward pass that leaves the gradients to the parameters, as in training."""
    for parameter in workload.inputs:
        parameter.grad = None
    forward_ms, y = wall_ms(workload.forward, device)
    backward_ms, _ = wall_ms(partial(y.backward, torch.ones_like(y)), device)
    return forward_ms, backward_ms


def derive(case: Case, record: Record, copy: float) -> Record:
    """The record with what follows from its times, and from the bytes per second of a copy."""
    if case.kind in KERNELS:
        for key, nbytes in zip(('forward', 'backward'), case.fewest_bytes()):
            ms = record.get(f'{key}_graph_ms') or record.get(f'{key}_ms')
            record[f'{key}_floor'] = 1e3 * nbytes / copy / ms if ms else None
    elif case.kind == 'model':
        ms, graph_ms = (record.get(f'forward{key}') or record.get(f'both{key}') for key in ('_ms', '_graph_ms'))
        record['ms'], record['peak_mib'] = ms, record.get('forward_peak_mib') or record.get('training_peak_mib')
        record['images_per_second'] = 1e3 * case.batch / ms if ms else None
        record['graph_images_per_second'] = 1e3 * case.batch / graph_ms if graph_ms else None
    return record


def bench(cases: Sequence[Case], device: torch.device, repeats: int, copy: float) -> List[Record]:
    """Measures the cases one after another, those of the host's time in turn, under a progress bar.

    Args:
        copy: Bytes per second of a copy on the device.

    Returns:
        A record for each case; after an interrupt, of those before it.
    """
    alone, in_turn = ([case for case in cases if (case.kind == 'host') == is_host] for is_host in (False, True))
    records: List[Record] = []
    with suppress(KeyboardInterrupt):
        for case in track(alone, 'Measuring', disable=not alone):
            records.append(derive(case, measure(case, device, repeats), copy))
        records += measure_in_turn(in_turn, device, repeats)
    return records


def reports_of(records: Sequence[Record], facts: Dict[str, str]) -> List[Report]:
    """A section for each kind of cases."""
    reports = []
    for kind in dict.fromkeys(record['kind'] for record in records):
        rows = [record for record in records if record['kind'] == kind]
        columns = dict(COLUMNS.get(kind, COLUMNS['kernel']))
        columns.update((key, key) for row in rows for key in row if key.startswith('over '))
        table = pd.DataFrame(rows, columns=list(columns)).rename(columns=columns)
        messages = [f'{row["case"]} ({row["by"]}): {row["status"]}: {row["message"]}' for row in rows if row['message']]
        reports.append(Report(f'bench_kernels {kind}', TITLES[kind], facts, [table], NOTES[kind], messages))
    return reports


def select(cases: Sequence[Case], kinds: Sequence[str], patterns: Optional[Sequence[str]]) -> List[Case]:
    """The cases of these kinds whose names match one of the patterns.

    Raises:
        UserError: If a pattern matches nothing.
    """
    cases = [case for case in cases if case.kind in kinds]
    for pattern in patterns or ():
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise UserError(f'no case matches {pattern!r}; there are {", ".join(case.name for case in cases)}')
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--only', nargs='+', choices=KINDS, default=KINDS, help='kinds of cases')
    parser.add_argument('--case', nargs='+', metavar='GLOB', help="names of cases, such as 'ss2d_*_stage1'")
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help='timm names, for the kind model')
    parser.add_argument('--batch-size', type=positive, help="instead of each case's own")
    add_device_option(parser)
    parser.add_argument('--repeats', type=positive, default=30, help='runs of which the median time is taken')
    parser.add_argument('--output', type=Path, help='CSV file to write')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables of this run')
    args = parser.parse_args(argv)
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f'timm knows no model {", ".join(unknown)}')
    return args


def cases_of(args: argparse.Namespace) -> List[Case]:
    operators = *cases.scan_cases(args.device), *cases.ssd_cases(args.device), *cases.ss2d_cases(), *cases.moe_cases()
    found = select([*operators, *cases.model_cases(args.models), *cases.host_cases()], args.only, args.case)
    return [replace(case, batch=args.batch_size) for case in found] if args.batch_size else found


@one_line_errors('bench_kernels.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    chosen, console = cases_of(args), open_console(WIDTH)
    ceilings = measure_ceilings(args.device, args.repeats)
    records = bench(chosen, args.device, args.repeats, ceilings.copy)
    if len(records) < len(chosen):
        console.print(f'interrupted: {len(records)} of {len(chosen)} cases are measured')
    facts = {**facts_of(args.device, 'bench kernels', argv), 'repeats': f'medians of {args.repeats}'}
    facts['machine'] += f'; measured: {ceilings}'
    for report in reports_of(records, facts):
        report.publish(console, args.docs)
    if args.output:
        write_csv(args.output, [{**record, **facts} for record in records])


if __name__ == '__main__':
    main()
