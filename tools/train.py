"""Trains a classifier as a configuration says, on one device or, under torchrun, on many.

vmamba train configs/classification/mnist5k_vmamba_nano.yaml
torchrun --nproc-per-node 8 -m vmamba.tools.train configs/classification/vmamba_t.yaml --data-dir imagenet --resume
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record
from vmamba.tools.output_files import lock_folder, write_text, writing
from vmamba.tools.training.checkpoint import Checkpoints
from vmamba.tools.training.config import FIELDS, Config, add_options, load_config, option_of
from vmamba.tools.training.data import create_data
from vmamba.tools.training.engine import Trainer
from vmamba.tools.training.parallel import check_sharding, distribute
from vmamba.tools.training.report import Report
from vmamba.tools.training.runtime import Runtime, start
from vmamba.tools.training.seeding import seed_all
from vmamba.tools.training.setup import (
    create_model,
    create_optimizer,
    create_task,
    data_config_of,
    describe,
    starts_from_scratch,
)
from vmamba.tools.training.splits import class_names, load_datasets
from vmamba.tools.user_errors import UserError, nearest, program

import vmamba  # noqa: F401


def parse_args(argv: Optional[List[str]] = None) -> Tuple[Path, bool, Dict[str, Any]]:
    """The configuration's file, whether to resume, and the values given by option."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument('config', type=Path, help='YAML file, or the name of an installed one, such as vmamba_t')
    parser.add_argument('--resume', action='store_true', help='go on from the newest checkpoint, if there is one')
    add_options(parser.add_argument_group('keys of the configuration'))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = map(option_of, (*FIELDS, 'resume'))
        parser.error(f'unknown option {unknown[0]!r}{nearest(unknown[0].split("=")[0], known)}')
    values = vars(args)
    return values.pop('config'), values.pop('resume'), values


def check_output(config: Config, resume: bool) -> None:
    """Raises UserError rather than mix a new run with one that is there."""
    if Checkpoints(Path(config.output), 1).paths() and not resume:
        raise UserError(
            f'{config.output} holds a run already: --resume goes on with it, another --output begins a new one'
        )


def count_classes(config: Config, datasets: List[Any]) -> int:
    """Number of classes of the model: as configured, or those of the data."""
    names = class_names(datasets[0]) if datasets else None
    found = len(names) if names else None
    if config.num_classes is None:
        if found is None and datasets:
            raise UserError(f'{config.data} does not tell its classes: give --num-classes')
        return found or 1000
    if found and found > config.num_classes:
        raise UserError(f'the data has {found} classes, num_classes is {config.num_classes}; leave num_classes out')
    return config.num_classes


def create_trainer(config: Config, runtime: Runtime, report: Report) -> Trainer:
    """Everything of a run, in its first state."""
    config.precision = config.precision or ('bf16' if runtime.device.type == 'cuda' else 'fp32')
    datasets = load_datasets(config)
    num_classes = count_classes(config, datasets)
    seed_all(config.seed)
    model = create_model(config, num_classes).to(runtime.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    data_config = data_config_of(config, model)
    train, validation = create_data(config, data_config, datasets, num_classes, runtime)
    facts = describe(config, data_config, num_classes, class_names(datasets[0]) if datasets else None)
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    task = create_task(config, model, runtime.device)
    parallel = distribute(config, task, runtime)
    optimizer = create_optimizer(config, model, config.batch_size * config.accumulate * runtime.world)
    processes = f'{runtime.world} process(es) on {runtime.device.type}'
    report.say(f'{config.model}: {params:.2f} M parameters, {num_classes} classes, {processes}, {config.precision}')
    return Trainer(config, runtime, task, parallel, optimizer, train, validation, facts, report)


def train(argv: Optional[List[str]] = None) -> None:
    path, resume, overrides = parse_args(argv)
    config = load_config(path, overrides)
    check_output(config, resume)
    runtime = start(config.device)
    check_sharding(config, runtime)
    report = Report(Path(config.output), runtime)
    trainer = create_trainer(config, runtime, report)
    with lock_folder(Path(config.output)) if runtime.is_primary else nullcontext():
        run(trainer, resume)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(trainer: Trainer, resume: bool) -> None:
    """Trains in a folder that is locked."""
    config, runtime, report = trainer.config, trainer.runtime, trainer.report
    if runtime.is_primary:
        check_output(config, resume)  # again, since another run may have ended meanwhile
    resumed = resume and trainer.resume()
    if runtime.is_primary:
        with writing(Path(config.output)):
            trainer.checkpoints.remove_parts()
        write_text(Path(config.output, 'config.yaml'), yaml.safe_dump(vars(config), sort_keys=False))
        if starts_from_scratch(config) and not resumed:
            report.warn(
                'new_head and layer_decay are for fine-tuning, but this run starts without weights: '
                'give --pretrained or --checkpoint FILE'
            )
    report.open_records(trainer.update, trainer.epoch)
    try:
        trainer.run()
    except (RuntimeError, OSError):
        if trainer.stop.signal and not runtime.is_primary:  # the first process has saved and gone
            trainer.stop.exit(trainer.stop.signal)
        raise
    finally:
        report.close()


@record
def main(argv: Optional[List[str]] = None) -> None:
    try:
        train(argv)
    except UserError as error:
        rank = os.environ.get('RANK')
        place = f' [process {rank}]' if rank else ''
        print(f'{program("train.py")}: error:{place} {error}', file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == '__main__':
    main()
