"""Trains mixers on long-range tasks and on bytes, several runs at a time, and compares accuracy and bits per byte.

With --resume, runs that are done stay done, and those that were interrupted continue from their checkpoints. The report
has all runs in the folder, also those of earlier calls; of a run that is done it needs result.json and run.yaml alone.

    vmamba make-sequences listops
    vmamba make-sequences pathfinder32 --workers 16
    vmamba compare sequences --jobs 12 --docs docs/benchmarks.md
    vmamba compare sequences --tasks induction_heads --models mamba h3 --seeds 0 --resume
"""

import argparse
import bz2
import json
import lzma
import platform
import shlex
import shutil
import sys
import sysconfig
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import yaml

from vmamba.configs import FOLDER
from vmamba.sequence import ByteFiles, create_language_model
from vmamba.tools.benchmarks.report import Report, versions
from vmamba.tools.benchmarks.trainings import (
    RESULT,
    SCRIPT,
    Row,
    begin,
    call,
    drop_weights,
    epochs_of,
    run_all,
    spread,
)
from vmamba.tools.devices import add_device_option, device_name
from vmamba.tools.output_files import lock_folder
from vmamba.tools.sequences.tasks import FRESH, PREFIX, definition
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import FIELDS, Config, add_options, load_config
from vmamba.tools.training.runtime import StopRequest
from vmamba.tools.training.sequences import create_model
from vmamba.tools.user_errors import Parser, UserError, changes, one_line_errors, positive, positive_float

VALIDATE, EVALUATE = (SCRIPT.with_name(f'{name}.py') for name in ('validate_sequences', 'evaluate_bytes'))
BYTES = 'bytes'
HELD_OUT = 0.1  # of the bytes
PLACES = 'data_dir', 'device', 'output', 'workers'  # keys that do not change what is learnt
OWN_KEYS = 'task', 'model', 'model_args', 'data', 'data_dir', 'seed', 'device', 'output'  # which are set here
COLUMNS = 'task', 'model', 'seed', 'status', 'epochs', 'result'
LENGTHS = [2**power for power in range(6, 21, 2)]
WINDOWS = [1024, 8192]  # of bytes
SHORT = dict(depth=2, d_model=64)
LONG = dict(depth=4, d_model=128, bidirectional=True)


def _with_mlp(**layer_cfg: Any) -> Dict[str, Any]:
    return {'feed_forward': 'mlp', 'layer_cfg': {'mlp': {'d_hidden': 128}, **layer_cfg}}


class Case(NamedTuple):
    """A task: arguments of its models by name, keys in place of the recipe's, and published figures by model."""

    recipe: str
    models: Dict[str, Dict[str, Any]]
    keys: Dict[str, Any]
    published: Dict[str, str] = {}


_SHORT_MODELS = {
    'mamba': SHORT,
    'mamba2': {**SHORT, 'layer_cfg': {'mamba2': {'headdim': 32, 'd_state': 64}}},
    'h3': SHORT,
    'attention': {**SHORT, **_with_mlp(attention={'num_heads': 4, 'rotary_emb_dim': 16})},
}
# Of 0.53 to 0.56 M parameters. Chosen without looking at accuracies.
_LONG_MODELS = {
    's4d': {**LONG, 'd_model': 144, **_with_mlp()},
    'h3': {**LONG, 'd_model': 144, 'depth': 3},
    'mamba': LONG,
    'mamba2': {**LONG, 'layer_cfg': {'mamba2': {'headdim': 32, 'd_state': 128}}},
    'attention': {**LONG, 'd_model': 144, **_with_mlp(attention={'num_heads': 6, 'rotary_emb_dim': 24})},
}
_LAYERS = dict(n_layer=4, layers=[['attention', 'mlp']] * 4)
_LAYERS['layer_cfg'] = {'attention': {'num_heads': 4, 'rotary_emb_dim': 64}, 'mlp': {'d_hidden': 768}}
_SHARED = dict(workers=1, log=[], keep_checkpoints=1, checkpoint_every=500)
CASES = {
    'induction_heads': Case(
        'induction_heads',
        _SHORT_MODELS,
        dict(batch_size=32, val_batch_size=256, epochs=15),
        {'mamba': '100 up to 1048576', 'h3': '80.9 at 512, 39.5 at 1024', 'attention': '83.6 at 512, 31.3 at 1024'},
    ),
    'selective_copying': Case(
        'selective_copying',
        {'s4d': {**SHORT, **_with_mlp()}, **_SHORT_MODELS},
        dict(data_args={'length': 256, 'tokens': 16, 'train_count': 65536}, lr=1e-3, epochs=10),
        {'mamba': '99.8 at 4096', 'h3': '57.0 at 4096', 's4d': '18.3 at 4096 (S4 without gate)'},
    ),
    'listops': Case(
        'listops',
        _LONG_MODELS,
        dict(lr=1e-3, epochs=4, precision='bf16'),
        {'s4d': '60.47', 'h3': '57.5', 'mamba': '32.5 (in the paper of xLSTM)', 'attention': '36.37'},
    ),
    'pathfinder32': Case(
        'pathfinder32',
        _LONG_MODELS,
        dict(lr=1e-3, epochs=8, precision='bf16'),
        {'s4d': '93.06', 'h3': '93.0', 'mamba': '99.2 (in the paper of xLSTM)', 'attention': '71.40'},
    ),
    BYTES: Case(
        'mambabyte_nano',
        {'mamba': {}, 'mamba2': {'ssm_cfg': {'layer': 'Mamba2'}}, 'transformer': _LAYERS},
        dict(seq_len=1024, batch_size=32, lr=2e-3, epochs=10, precision='bf16'),
    ),
}
LONGEST = {'attention': 2**16}  # whose time grows with the square of the length
NOTES = """\
Accuracy on fresh sequences or the test split, in percent, of the weights that were best on other sequences; ± is the
standard deviation over the seeds. Short trainings: see the epochs, and `configs/sequence` for the published ones. An
epoch is 2,048 updates of 32 sequences for induction heads (published: 25 epochs of 8,192 updates of 8), 1,024 updates
of 64 at length 256 for selective copying (published: 401,408 at length 4,096), 1,920 of 50 for ListOps and 2,500 of 64
for Pathfinder, unless the command says otherwise. ListOps and Pathfinder are bidirectional with the mean of all
positions, the others causal. The published figures are of larger models or longer trainings, and not measured here.

Induction heads are trained at length 256, and measured on 256 sequences of each length; attention, with rotary
positions, up to {longest}. `-` was not measured, or failed as the messages say."""
BYTE_NOTES = """\
Bits per byte of {size:,} bytes in {files} files of the Python {python} standard library's sources (`*.py` without tests
and installed packages), which no training has seen: whole files were drawn for {share:.0%} of the bytes. The models are
trained on the other {trained:,} bytes with windows of {seq_len}, by the recipe of the command above. A byte is
predicted from at least half a window before it, or from the bytes before it at the start. The Transformer has rotary
positions and gated MLPs. `xz` (preset 9e) and `bz2` (9) compress the held-out bytes in one stream; `after the training
bytes` is what they add to the xz stream of those. ± is the standard deviation over the seeds."""


class Run(NamedTuple):
    """What is trained: a model by its name in the tables, on a task, with a seed."""

    task: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return '_'.join(map(str, self))


def config_of(run: Run, args: argparse.Namespace) -> Config:
    """Its recipe with the keys of the case, of the command line and of its own."""
    case = CASES[run.task]
    keys = {key: value for key, value in vars(args).items() if key in FIELDS and key not in OWN_KEYS}
    own = dict(model=run.model, model_args=case.models[run.model], seed=run.seed, device=args.device.type)
    if run.task == BYTES:
        own.update(model='mambabyte_tiny', data=str(args.output / 'sources'))
    return load_config(FOLDER / 'sequence' / f'{case.recipe}.yaml', {**_SHARED, **case.keys, **keys, **own})


def parameters(run: Run, config: Config) -> int:
    if run.task == BYTES:
        model = create_language_model(config.model, **config.model_args, device='meta')
    else:
        model = create_model(config, definition(config.data.removeprefix(PREFIX), **config.data_args))
    return sum(parameter.numel() for parameter in model.parameters())


def train(run: Run, stop: StopRequest, args: argparse.Namespace) -> Optional[Row]:
    """Trains and evaluates in processes of their own; returns what came of it, nothing if interrupted."""
    if stop.signal:
        return None
    folder, config = args.output / run.name, config_of(run, args)
    begin(folder, vars(config))
    command = SCRIPT, folder / 'run.yaml', '--output', folder, '--resume'
    status, message = call(command, folder / 'log.txt', args.timeout, stop)
    found, size = {}, None
    if status == 'ok':
        found, message = evaluate(run, folder, config, args, stop)
        size = parameters(run, config)
    if stop.signal:
        return None
    drop_weights(folder)
    result = next(iter(found.values()), None)
    row = dict(**run._asdict(), status=status, epochs=len(epochs_of(folder)), parameters=size, result=result)
    return {**row, 'found': found, 'message': message}


def evaluate(
    run: Run, folder: Path, config: Config, args: argparse.Namespace, stop: StopRequest
) -> Tuple[Dict[str, float], str]:
    """Accuracy or bits per byte, by length as text, that of the training first; and messages."""
    task, found, messages = config.data.removeprefix(PREFIX), {}, []
    device = '--device', args.device.type
    path = folder / 'evaluation.csv'
    if run.task == BYTES:
        for window in WINDOWS:
            data = '--model', folder / 'best', '--data', args.output / 'held_out', '--output', path
            windows = '--window', window, '--stride', window // 2
            messages.append(call([EVALUATE, *data, *windows, *device], folder / 'evaluate.txt', args.timeout, stop)[1])
            if not messages[-1] and not stop.signal:
                found[str(window)] = float(pd.read_csv(path).bits_per_byte[0])
        return found, ' '.join(filter(None, messages))
    lengths = [config.data_args['length']] if task in FRESH else []
    if task == 'induction_heads':
        lengths += [length for length in args.lengths if length <= LONGEST.get(run.model, length)]
    lengths = ['--lengths', *dict.fromkeys(lengths), '--count', 256] if lengths else []
    command = VALIDATE, folder / 'best.pt', '--split', 'test', *lengths, '--output', path, *device
    _, message = call(command, folder / 'evaluate.txt', args.timeout, stop)
    if path.is_file():  # without the lengths that do not fit into the memory
        found = {str(length): value for length, value in pd.read_csv(path).set_index('length').accuracy.items()}
    return found, message


def write_sources(folder: Path) -> None:
    """Copies the sources of the standard library to `sources`, and those of some files into one, `held_out`."""
    root, copy = Path(sysconfig.get_path('stdlib')), folder / 'sources'
    if (folder / 'held_out').is_file():
        return
    shutil.rmtree(copy, ignore_errors=True)
    for path in sorted(root.rglob('*.py')):
        if not {'site-packages', 'dist-packages', 'test', 'tests'} & {*path.relative_to(root).parts}:
            (copy / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(root))
    _, held = ByteFiles.find(copy).hold_out(HELD_OUT)
    content = b''.join(part.path.read_bytes() for part in held.parts)
    for part in held.parts:
        part.path.unlink()
    facts = dict(python=platform.python_version(), files=len(held.parts), size=len(content), share=HELD_OUT)
    (folder / 'sources.json').write_text(json.dumps(facts))
    (folder / 'held_out').write_bytes(content)


def compressors(folder: Path) -> List[Row]:
    """Bits per byte of the held-out bytes by the compressors of Python's standard library."""
    held, files = (folder / 'held_out').read_bytes(), ByteFiles.find(folder / 'sources')
    before = b''.join(part.path.read_bytes() for part in files.parts)
    xz = partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
    sizes = {'xz': len(xz(held)), 'bz2': len(bz2.compress(held, 9))}
    sizes['xz, after the training bytes'] = len(xz(before + held)) - len(xz(before))
    return [{'model': name, 'bits per byte': f'{8 * size / len(held):.3f}'} for name, size in sizes.items()]


def earlier_rows(runs: Sequence[Run], args: argparse.Namespace) -> List[Row]:
    """Those of the runs that are done, with --resume.

    Raises:
        UserError: If there are such runs without --resume, or they had other settings.
    """
    rows = []
    for run in runs:
        folder = args.output / run.name
        if (folder / 'run.yaml').is_file():
            if not args.resume:
                raise UserError(f'{folder} is there already; give --resume, or choose another --output')
            was, now = yaml.safe_load((folder / 'run.yaml').read_text()), vars(config_of(run, args))
            now = {key: value for key, value in now.items() if key not in PLACES}
            if differences := changes(was, now):
                raise UserError(f'{folder} was made with {differences}; choose another --output')
        if (folder / RESULT).is_file():
            rows.append(read(folder / RESULT))
    return rows


def tables(rows: Sequence[Row]) -> List[pd.DataFrame]:
    """A row a model, of every task, and all runs."""
    frame, summaries = pd.DataFrame(rows), []
    for task, own in frame.groupby('task', sort=False):
        models = []
        lengths = sorted({int(length) for found in own.found for length in found})
        for model, runs in own.groupby('model', sort=False):
            size = runs.parameters.dropna()
            row = {'task': task, 'model': model, 'parameters, K': f'{size.iloc[0] / 1e3:.0f}' if len(size) else '-'}
            row['epochs'] = runs.epochs.max()
            for length in lengths:
                values = pd.Series([found.get(str(length)) for found in runs.found], dtype=float)
                if task == BYTES:
                    row[f'bits per byte, windows of {length}'] = spread(values, '.3f')
                else:
                    row[f'at {length}'] = spread(values) if values.notna().any() else '-'
            if task != BYTES:
                row['published'] = CASES[task].published.get(model, '')
            models.append(row)
        summaries.append(pd.DataFrame(models))
    return [*summaries, frame[list(COLUMNS)]]


def reports(rows: Sequence[Row], facts: Dict[str, str], args: argparse.Namespace) -> List[Report]:
    """Of the tasks, and of the bytes, if there are rows."""
    found = []
    for name, title in (('tasks', 'Long-range tasks'), (BYTES, 'Bits per byte')):
        own = [row for row in rows if (row['task'] == BYTES) == (name == BYTES)]
        if not own:
            continue
        notes, extra = NOTES.format(longest=LONGEST['attention']), []
        if name == BYTES:
            trained = len(ByteFiles.find(args.output / 'sources'))
            split = read(args.output / 'sources.json')
            notes = BYTE_NOTES.format(**split, trained=trained, seq_len=config_of(run_of(own[0]), args).seq_len)
            extra = [pd.DataFrame(compressors(args.output))]
        messages = [f'{run_of(row).name}: {row["status"]}: {row["message"]}' for row in own if row['message']]
        found.append(Report(f'compare_sequences {name}', title, facts, tables(own) + extra, notes, messages))
    return found


def run_of(row: Row) -> Run:
    return Run(*(row[name] for name in Run._fields))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage='%(prog)s [--TASKS NAME ...] [--KEY VALUE ...]')
    parser.add_argument('--tasks', nargs='+', choices=CASES, default=list(CASES), help='all by default')
    parser.add_argument('--models', nargs='+', help='of the tables; default: all of each task')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--lengths', nargs='+', type=positive, default=LENGTHS, help='to test induction heads at')
    parser.add_argument('--jobs', type=positive, default=1, help='runs at once')
    add_device_option(parser)
    parser.add_argument('--timeout', type=positive_float, default=3600, help='most seconds for a run')
    parser.add_argument('--output', type=Path, default=Path('runs/sequences'), help='folder of the runs')
    parser.add_argument('--resume', action='store_true', help='keep and continue the runs in --output')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables')
    add_options(parser.add_argument_group('keys of the configurations, for all runs'), without=OWN_KEYS)
    return parser.parse_args(argv)


def runs_of(args: argparse.Namespace) -> List[Run]:
    """One seed after another."""
    known = {model for case in CASES.values() for model in case.models}
    if unknown := [model for model in args.models or () if model not in known]:
        raise UserError(f'there is no model {unknown[0]!r}; there are {", ".join(sorted(known))}')
    runs = [Run(task, model, seed) for seed, task in product(args.seeds, args.tasks) for model in CASES[task].models]
    return [run for run in runs if not args.models or run.model in args.models]


@one_line_errors('compare_sequences.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    runs, console = runs_of(args), open_console()
    job, where = partial(train, args=args), (args.output, 'sequences.csv', COLUMNS)
    with lock_folder(args.output):
        rows = earlier_rows(runs, args)
        others = [row for row in map(read, args.output.glob(f'*/{RESULT}')) if run_of(row) not in runs]
        if any(run.task == BYTES for run in (*runs, *map(run_of, others))):
            write_sources(args.output)
        run_all(Run, lambda: runs, job, rows, *where, args.jobs, len(runs), console)
        facts = {
            'machine': device_name(args.device),
            'versions': versions(),
            'command': shlex.join(['vmamba', 'compare', 'sequences', *argv]),
            'runs of this command done': f'{len(rows)} of {len(runs)}',
        }
        rows = sorted(rows + others, key=lambda row: (*places(row), row['seed']))
        for report in reports(rows, facts, args):
            report.publish(console, args.docs)


def places(row: Row) -> Tuple[int, int]:
    """Of task and model in the tables."""
    return list(CASES).index(row['task']), list(CASES[row['task']].models).index(row['model'])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == '__main__':
    main()
