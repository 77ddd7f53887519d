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
from vmamba.tools.benchmarks.report import Report
from vmamba.tools.benchmarks.trainings import RESULT, SCRIPT, Comparison, Row, add_run_options, spread
from vmamba.tools.output_files import lock_folder
from vmamba.tools.sequences.tasks import FRESH, PREFIX, definition
from vmamba.tools.training.config import Config, load_config
from vmamba.tools.training.sequences import create_model
from vmamba.tools.user_errors import Parser, UserError, changes, one_line_errors, positive

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


class SequenceComparison(Comparison):
    """Mixers on tasks."""

    name, kind, columns, own = 'compare sequences', Run, COLUMNS, OWN_KEYS

    def runs(self) -> List[Run]:
        """All runs, one seed after another."""
        args = self.args
        runs = [
            Run(task, model, seed) for seed, task in product(args.seeds, args.tasks) for model in CASES[task].models
        ]
        return [run for run in runs if not args.models or run.model in args.models]

    def settings(self, run: Run) -> Config:
        """The recipe with the keys of the case, of the command line and of the run's own."""
        case = CASES[run.task]
        own = dict(model=run.model, model_args=case.models[run.model], seed=run.seed, device=self.args.device.type)
        if run.task == BYTES:
            own.update(model='mambabyte_tiny', data=str(self.args.output / 'sources'))
        keys = {**_SHARED, **case.keys, **self.keys, **own}
        return load_config(FOLDER / 'sequence' / f'{case.recipe}.yaml', keys)

    def config(self, run: Run) -> Dict[str, Any]:
        return vars(self.settings(run))

    def evaluate(self, run: Run, folder: Path, ended: bool) -> Tuple[Row, str]:
        """The number of parameters, and accuracy or bits per byte, by length as text, that of the training first."""
        if not ended:
            return dict(parameters=None, result=None, found={}), ''
        config, args, found, messages = self.settings(run), self.args, {}, []
        path, log = folder / 'evaluation.csv', folder / 'evaluate.txt'
        where = '--output', path, '--device', args.device.type
        if run.task == BYTES:
            for window in WINDOWS:
                data = '--model', folder / 'best', '--data', args.output / 'held_out'
                command = EVALUATE, *data, '--window', window, '--stride', window // 2, *where
                messages.append(self.call(command, log)[1])
                if not messages[-1]:
                    found[str(window)] = float(pd.read_csv(path).bits_per_byte[0])
        else:
            lengths = [config.data_args['length']] if run.task in FRESH else []
            if run.task == 'induction_heads':
                lengths += [length for length in args.lengths if length <= LONGEST.get(run.model, length)]
            lengths = ['--lengths', *dict.fromkeys(lengths), '--count', 256] if lengths else []
            command = VALIDATE, folder / 'best.pt', '--split', 'test', *lengths, *where
            messages.append(self.call(command, log)[1])
            if path.is_file():  # without the lengths that do not fit into the memory
                found = {str(length): value for length, value in pd.read_csv(path).set_index('length').accuracy.items()}
        facts = dict(parameters=parameters(run, config), result=next(iter(found.values()), None), found=found)
        return facts, ' '.join(filter(None, messages))

    def resume(self) -> List[Row]:
        """Takes the rows of the runs that are done, with --resume; returns those of other runs in the folder.

        Raises:
            UserError: If there are such runs without --resume, or they had other settings.
        """
        output, runs = self.args.output, self.runs()
        for run in runs:
            folder = self.folder(run)
            if (folder / 'run.yaml').is_file():
                if not self.args.resume:
                    raise UserError(f'{folder} is there already; give --resume, or choose another --output')
                was = yaml.safe_load((folder / 'run.yaml').read_text())
                now = {key: value for key, value in self.config(run).items() if key not in PLACES}
                if differences := changes(was, now):
                    raise UserError(f'{folder} was made with {differences}; choose another --output')
        done = [json.loads(path.read_text()) for path in output.glob(f'*/{RESULT}')]
        self.rows = [row for row in done if self.run_of(row) in runs]
        return [row for row in done if self.run_of(row) not in runs]

    def reports(self, rows: Sequence[Row], facts: Dict[str, str]) -> List[Report]:
        """A report of the tasks and one of the bytes, where there are rows."""
        found, output = [], self.args.output
        for name, title in (('tasks', 'Long-range tasks'), (BYTES, 'Bits per byte')):
            own = [row for row in rows if (row['task'] == BYTES) == (name == BYTES)]
            if not own:
                continue
            notes, extra = NOTES.format(longest=LONGEST['attention']), []
            if name == BYTES:
                split = json.loads((output / 'sources.json').read_text())
                split.update(trained=len(ByteFiles.find(output / 'sources')))
                notes = BYTE_NOTES.format(**split, seq_len=self.settings(self.run_of(own[0])).seq_len)
                extra = [pd.DataFrame(compressors(output))]
            names = f'compare_sequences {name}', title
            found.append(Report(*names, facts, tables(own) + extra, notes, self.messages(own)))
        return found


def parameters(run: Run, config: Config) -> int:
    if run.task == BYTES:
        model = create_language_model(config.model, **config.model_args, device='meta')
    else:
        model = create_model(config, definition(config.data.removeprefix(PREFIX), **config.data_args))
    return sum(parameter.numel() for parameter in model.parameters())


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


def order(row: Row) -> Tuple[int, int, int]:
    """Key that sorts rows by task, model and seed."""
    return list(CASES).index(row['task']), list(CASES[row['task']].models).index(row['model']), row['seed']


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage='%(prog)s [--TASKS NAME ...] [--KEY VALUE ...]')
    parser.add_argument('--tasks', nargs='+', choices=CASES, default=list(CASES), help='all by default')
    models = sorted({model for case in CASES.values() for model in case.models})
    parser.add_argument('--models', nargs='+', choices=models, help='default: all of each task')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--lengths', nargs='+', type=positive, default=LENGTHS, help='to test induction heads at')
    add_run_options(parser, 'runs/sequences', OWN_KEYS)
    return parser.parse_args(argv)


@one_line_errors('compare_sequences.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    comparison = SequenceComparison(parse_args(argv), argv)
    args, total = comparison.args, len(comparison.runs())
    with lock_folder(args.output):
        others = comparison.resume()
        if BYTES in (*args.tasks, *(row['task'] for row in others)):
            write_sources(args.output)
        comparison.train_all('sequences.csv', total)
        facts = {**comparison.facts, 'runs of this command done': f'{len(comparison.rows)} of {total}'}
        for report in comparison.reports(sorted(comparison.rows + others, key=order), facts):
            report.publish(comparison.console, args.docs)


if __name__ == '__main__':
    main()
