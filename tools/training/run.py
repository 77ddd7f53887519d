"""A training run, from its configuration to its results."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import yaml

import vmamba  # noqa: F401
from vmamba.tools.output_files import lock_folder, write_text, writing
from vmamba.tools.user_errors import UserError

from . import language, sequences
from .checkpoint import check_output
from .config import Config
from .data import Parts, create_data
from .engine import Trainer
from .parallel import check_sharding, distribute
from .report import Report
from .runtime import Runtime, start
from .seeding import seed_all
from .setup import create_model, create_optimizer, create_task, data_config_of, describe, starts_from_scratch
from .splits import class_names, load_datasets


def train(config: Config, resume: bool) -> List[Dict[str, float]]:
    """Trains as configured; returns the metrics of each epoch.

    Raises:
        UserError: If a setting does not fit the model, the data or the machine, or the output folder holds a run that
            is not to be resumed.
    """
    check_output(config.output, resume)
    runtime = start(config.device)
    check_sharding(config, runtime)
    trainer = create_trainer(config, runtime, Report(config, runtime))
    try:
        with lock_folder(Path(config.output)) if runtime.is_primary else nullcontext():
            run(trainer, resume)
    finally:
        trainer.stop.restore()
    if dist.is_initialized():
        dist.destroy_process_group()
    return trainer.history


def count_classes(config: Config, datasets: List[Any]) -> int:
    """Number of classes of the model: as configured, or those of the data."""
    names = class_names(datasets[0]) if datasets else None
    found = len(names) if names else None
    if config.num_classes is None:
        if found is None and datasets:
            raise UserError(f'{config.data} does not name its classes: give --num-classes')
        return found or 1000
    if found and found > config.num_classes:
        raise UserError(f'the data has {found} classes, num_classes is {config.num_classes}; leave num_classes out')
    return config.num_classes


def create_image_parts(config: Config, runtime: Runtime) -> Parts:
    """Model, data and facts of a run on images."""
    datasets = load_datasets(config)
    num_classes = count_classes(config, datasets)
    seed_all(config.seed)
    model = create_model(config, num_classes).to(runtime.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    data_config = data_config_of(config, model)
    train, validation = create_data(config, data_config, datasets, num_classes, runtime)
    facts = describe(config, data_config, num_classes, class_names(datasets[0]) if datasets else None)
    counts = [len(dataset) for dataset in datasets] or [len(train), 0]
    return Parts(model, train, validation, facts, '{} images to train on, {} to validate on'.format(*counts))


def create_trainer(config: Config, runtime: Runtime, report: Report) -> Trainer:
    """Model, data and optimizer of a run at its start."""
    config.precision = config.precision or ('bf16' if runtime.device.type == 'cuda' else 'fp32')
    create_parts, make_task = {
        'classification': (create_image_parts, create_task),
        'language': (language.create_parts, language.create_task),
        'sequence': (sequences.create_parts, sequences.create_task),
    }[config.task]
    parts = create_parts(config, runtime)
    report.say(parts.summary)
    task = make_task(config, parts.model, runtime.device)
    params = sum(parameter.numel() for parameter in parts.model.parameters()) / 1e6
    parallel = distribute(config, task, runtime)
    optimizer = create_optimizer(config, parts.model, config.batch_size * config.accumulate * runtime.world)
    processes = f'{runtime.world} process(es) on {runtime.device.type}'
    classes = f'{parts.facts["num_classes"]} classes'
    report.say(f'{config.model}: {params:.2f} M parameters, {classes}, {processes}, {config.precision}')
    return Trainer(config, runtime, task, parallel, optimizer, parts, report)


def run(trainer: Trainer, resume: bool) -> None:
    """Trains in a locked folder."""
    config, runtime, report = trainer.config, trainer.runtime, trainer.report
    if runtime.is_primary:
        check_output(config.output, resume)  # again: another run may have ended in the meantime
    resumed = resume and trainer.resume()
    if runtime.is_primary:
        with writing(Path(config.output)):
            trainer.checkpoints.remove_parts()
        write_text(Path(config.output, 'config.yaml'), yaml.safe_dump(vars(config), sort_keys=False))
        if starts_from_scratch(config) and not resumed:
            report.warn(
                f'{config.model} starts from random weights; to fine-tune, give --pretrained or --checkpoint FILE'
            )
    report.open_records(trainer.update, trainer.epoch)
    try:
        trainer.run()
    except (RuntimeError, OSError):
        if trainer.stop.signal and not runtime.is_primary:  # the first process has saved and ended
            trainer.stop.exit(trainer.stop.signal)
        raise
    finally:
        report.close()
