"""Times the kernels and the models that run on them: forward, backward, CUDA graphs, memory, limits and the host.

vmamba bench kernels --output kernels.csv --docs docs/benchmarks.md
vmamba bench kernels --only model --compile-training --activation-memory-budget 0.5
vmamba bench kernels --only scan --case '*_n16_*'
vmamba bench kernels --only host --repeats 100 --docs docs/benchmarks.md
vmamba bench kernels --device cpu --batch-size 1 --repeats 1 --case ss2d_vmamba_t_stage4
"""

import argparse
import statistics
import sys
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from vmamba.tools.benchmarks.kernel_cases import (
    BACKWARD,
    BOTH,
    FORWARD,
    KINDS,
    Case,
    HostCase,
    ModelCase,
    ScanCase,
    Workload,
    host_cases,
    mamba_ssm_scan,
    model_cases,
    scan_cases,
    ss2d_cases,
)
from vmamba.tools.benchmarks.kernel_report import Result, Run, write_csv, write_docs, write_report
from vmamba.tools.benchmarks.measure import capture, is_out_of_memory
from vmamba.tools.benchmarks.sections import command_of
from vmamba.tools.benchmarks.timing import measure_ceilings, median_ms, peak_mib, settled_memory, wall_ms
from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import one_line_errors

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

MODELS = ('vmamba_t', 'vim_t', 'swin_tiny_patch4_window7_224', 'convnext_tiny')
OUTPUTS = ('--output', '--csv', '--docs')
WIDTH = 200  # of the tables where there is no terminal
TURN = 10  # counted passes of a model before the next one takes its turn


def measure(case: Case, device: torch.device, repeats: int) -> Result:
    """Measures a case; whatever goes wrong is noted in the result, beside what was measured before."""
    result = Result(case)
    with _noted(result):
        _measure(result, device, repeats)
    if isinstance(case, ModelCase) and case.compile:
        torch.compiler.reset()  # the next model shall not count as a recompilation of this one
    return result


@contextmanager
def _noted(result: Result) -> Iterator[None]:
    """Ends what goes wrong inside by a note in the result."""
    try:
        yield
    except Exception as error:
        result.status = 'OOM' if is_out_of_memory(error) else 'failed'
        result.message = (str(error).strip().splitlines() or [type(error).__name__])[0]


def _measure(result: Result, device: torch.device, repeats: int) -> None:
    """Memory first, before a graph holds any, then times; each number is kept as soon as it is there."""
    passes = result.case.passes
    baseline = settled_memory(device)
    workload = result.case.workload(device)
    forward = torch.no_grad()(workload.forward)
    both = partial(_forward_backward, workload)
    if FORWARD in passes:
        forward()  # compiles
        result.forward_peak_mib = peak_mib(forward, device, baseline)
        result.forward_ms = median_ms(forward, device, repeats)
    if BOTH in passes:
        both()
        result.training_peak_mib = peak_mib(both, device, baseline)
        result.forward_backward_ms = median_ms(both, device, repeats)
    if BACKWARD in passes:
        result.backward_ms, result.backward_timed = _backward_ms(workload, result, device, repeats)
    if device.type == 'cuda' and FORWARD in passes:
        result.forward_graph_ms = median_ms(capture(forward), device, repeats)
    captures_training = BACKWARD in passes or (isinstance(result.case, ModelCase) and result.case.compile)
    if device.type == 'cuda' and BOTH in passes and captures_training:
        result.forward_backward_graph_ms = median_ms(capture(both), device, repeats)


def _forward_backward(workload: Workload) -> Tuple[Optional[Tensor], ...]:
    y = workload.forward()
    return torch.autograd.grad(y, workload.inputs, torch.ones_like(y), allow_unused=True)


def _backward_ms(workload: Workload, result: Result, device: torch.device, repeats: int) -> Tuple[float, str]:
    """Times the backward pass alone, again and again after one forward pass, or takes the difference if it cannot."""
    y = workload.forward()
    grad = torch.ones_like(y)
    try:
        backward = partial(torch.autograd.grad, y, workload.inputs, grad, retain_graph=True, allow_unused=True)
        return median_ms(backward, device, repeats), 'alone'
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a graph that does not survive its backward pass
        return result.forward_backward_ms - result.forward_ms, 'difference'


def measure_in_turn(cases: Sequence[HostCase], device: torch.device, repeats: int) -> List[Result]:
    """Measures the forward and the backward pass of all models, which take turns of several passes in a row.

    The first pass of a turn finds the caches of the processor full of another model, the first round compiles: neither
    is counted.
    """
    results = [Result(case) for case in cases]
    workloads: Dict[str, Workload] = {}
    times: Dict[str, List[Tuple[float, float]]] = {case.name: [] for case in cases}
    for result in results:
        with _noted(result):
            workloads[result.case.name] = result.case.workload(device)
    passes = min(TURN, repeats)
    for _ in range(1 + -(-repeats // passes)):
        for result in results:
            if result.status == 'ok':
                with _noted(result):
                    turn = [_wall_times(workloads[result.case.name], device) for _ in range(1 + passes)]
                    times[result.case.name] += turn[1:]
    for result in results:
        if result.status == 'ok':
            measured = times[result.case.name][-repeats:]
            result.forward_ms, result.backward_ms = map(statistics.median, zip(*measured))
    return results


def _wall_times(workload: Workload, device: torch.device) -> Tuple[float, float]:
    """Milliseconds of a forward and of a backward pass that leaves the gradients to the parameters, as in training."""
    for parameter in workload.inputs:
        parameter.grad = None
    forward_ms, y = wall_ms(workload.forward, device)
    backward_ms, _ = wall_ms(partial(y.backward, torch.ones_like(y)), device)
    return forward_ms, backward_ms


def with_peer(cases: Sequence[Case], peer: Optional[Callable[..., Tensor]]) -> List[Case]:
    """Each scan is followed by the same one of the peer, if there is a peer."""
    found = []
    for case in cases:
        found.append(case)
        if peer is not None and isinstance(case, ScanCase):
            found.append(replace(case, function=peer, reference=None))
    return found


def bench(cases: Sequence[Case], device: torch.device, repeats: int, console: Console) -> List[Result]:
    """Measures the cases one after another, those of the host's time in turn, under a progress bar."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn('{task.description}')
    results = []
    alone, in_turn = ([case for case in cases if isinstance(case, HostCase) == is_host] for is_host in (False, True))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task('', total=len(cases))
        for case in alone:
            progress.update(task, description=f'{case.name} ({case.implementation})')
            results.append(measure(case, device, repeats))
            progress.advance(task)
        progress.update(task, description=', '.join(case.name for case in in_turn))
        return results + measure_in_turn(in_turn, device, repeats)


def select(cases: Sequence[Case], kinds: Sequence[str], patterns: Optional[Sequence[str]]) -> List[Case]:
    """The cases of these kinds whose names match one of the patterns.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    cases = [case for case in cases if case.kind in kinds]
    for pattern in patterns or ():
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f'no case matches {pattern!r}; there are {", ".join(case.name for case in cases)}')
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog='Times are medians.', allow_abbrev=False
    )
    parser.add_argument('--only', nargs='+', choices=KINDS, default=KINDS, help='kinds of cases')
    parser.add_argument('--case', nargs='+', metavar='GLOB', help="names of cases, such as 'ss2d_*_stage1'")
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help='timm names, for the kind model')
    parser.add_argument('--compile-training', action='store_true', help='also train under torch.compile')
    parser.add_argument(
        '--activation-memory-budget',
        type=float,
        metavar='SHARE',
        help="what compiled training keeps for its backward pass, of all that it would keep; PyTorch's own by default",
    )
    parser.add_argument(
        '--batch-size', type=int, help="instead of each case's own; leaves out the peers' earlier figures"
    )
    parser.add_argument('--batch', dest='batch_size', type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--repeats', type=int, default=30, help='runs of which the median time is taken')
    parser.add_argument('--list', action='store_true', help='print the names of the cases and stop')
    parser.add_argument('--output', type=Path, help='CSV file to write')
    parser.add_argument('--csv', dest='output', type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables of this run')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    for name, value in (('repeats', args.repeats), ('batch-size', args.batch_size)):
        if value is not None and value < 1:
            parser.error(f'--{name} must be at least 1, got {value}')
    budget = args.activation_memory_budget
    if budget is not None and not 0 <= budget <= 1:
        parser.error(f'--activation-memory-budget must be within [0, 1], got {budget}')
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        parser.error(f'timm knows no model {", ".join(unknown)}')
    cases = [*scan_cases(), *ss2d_cases(), *model_cases(args.models, args.compile_training), *host_cases()]
    try:
        args.cases = select(cases, args.only, args.case)
    except ValueError as error:
        parser.error(str(error))
    if args.batch_size is not None:
        args.cases = [replace(case, batch=args.batch_size, reference=None) for case in args.cases]
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line_errors('bench_kernels.py'):
        run(args, argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    console = open_console(WIDTH)
    if args.list:
        console.print('\n'.join(case.name for case in args.cases), highlight=False)
        return
    if args.activation_memory_budget is not None:
        functorch_config.activation_memory_budget = args.activation_memory_budget
    device = device_name(args.device)
    ceilings = measure_ceilings(args.device, args.repeats)
    cases = with_peer(args.cases, mamba_ssm_scan() if args.device.type == 'cuda' else None)
    results = bench(cases, args.device, args.repeats, console)
    found = Run(device, ceilings, args.repeats, command_of('bench kernels', argv, OUTPUTS), results)
    write_report(found, console)
    if args.output:
        write_csv(found, args.output)
    if args.docs:
        write_docs(found, args.docs)


if __name__ == '__main__':
    main()
