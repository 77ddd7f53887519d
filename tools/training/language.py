"""Training of language models on bytes: the parts that differ from those for images."""

from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import Sampler

from vmamba.layers import Attention
from vmamba.sequence import PRESETS, ByteFiles, ByteWindows, LanguageModel, create_language_model, next_token_loss
from vmamba.tools.user_errors import UserError, as_user_error, nearest

from .config import Config
from .data import Batch, OrderedBatches, Parts, batch_order, check_epoch, sequence_loader, validate_sequences
from .runtime import Runtime
from .seeding import seed_all

VAL_FRACTION = 0.05


class LanguageTask(ClassificationTask):
    """A language model with its loss; an input is a tuple of the model's arguments."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, next_token_loss, device=device, verbose=False)

    def forward(self, input: Tuple[Any, ...], target: Tensor) -> Dict[str, Tensor]:
        output = self.trainable_module(*input)
        return {'loss': self.criterion(output, target), 'output': output}


def create_task(config: Config, model: nn.Module, device: torch.device) -> LanguageTask:
    """The model with its loss."""
    return LanguageTask(model, device)


class StreamOrder(Sampler):
    """Batch sampler whose rows each walk a part of the windows in order: row r takes r * updates + update."""

    def __init__(self, windows: int, batch_size: int) -> None:
        self.size, self.batch_size, self.updates_per_epoch = windows, batch_size, windows // batch_size
        self.go_to(0, 0)

    def go_to(self, epoch: int, update: int) -> None:
        """The next iteration begins at this update, in any epoch."""
        self.update = update

    def __len__(self) -> int:
        return self.updates_per_epoch - self.update

    def __iter__(self) -> Iterator[List[int]]:
        for update in range(self.update, self.updates_per_epoch):
            yield [row * self.updates_per_epoch + update for row in range(self.batch_size)]

    def counts(self) -> Iterator[Tuple[int, float]]:
        """As `BatchOrder.counts`."""
        for _ in range(len(self)):
            yield self.batch_size, 1.0


class ByteBatches(OrderedBatches):
    """Training batches of windows; the state is carried from window to window if the configuration says so."""

    def __init__(self, windows: ByteWindows, config: Config, runtime: Runtime, model: LanguageModel) -> None:
        self.cache = model.allocate_cache(config.batch_size) if config.carry_state else None
        streams = config.carry_state
        order = StreamOrder(len(windows), config.batch_size) if streams else batch_order(windows, config, runtime)
        place = partial(_place, packed=windows.packed, runtime=runtime, cache=self.cache)
        super().__init__(sequence_loader(windows, config, runtime, batch_sampler=order), order, runtime, place=place)

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        """The batches of an epoch, from the given update to its end; a carried state starts at 0 in each epoch."""
        if update == 0:
            for tensor in self.carried():
                tensor.zero_()
        yield from super().batches(epoch, update)

    def carried(self) -> List[Tensor]:
        """The state that the next window continues from, for checkpoints."""
        return [tensor for own in self.cache or () for tensor in own]


def create_parts(config: Config, runtime: Runtime) -> Parts:
    """Model, data and facts of a run at its start.

    Raises:
        UserError: If a setting does not fit the model or the data.
    """
    _check(config, runtime)
    with as_user_error(f'data {config.data_dir or config.data}'):
        files = ByteFiles.find(config.data_dir or config.data, **config.data_args)
        kept, held = files.hold_out(config.val_fraction or VAL_FRACTION, config.seed)
        windows = [ByteWindows(part, config.seq_len, config.pack_documents) for part in (kept, held)]
    seed_all(config.seed)
    model = _create_model(config).to(runtime.device)
    if config.carry_state and any(isinstance(module, Attention) for module in model.modules()):
        raise UserError('carry_state is for state-space mixers, but the model has attention, whose keys would grow')
    data = ByteBatches(windows[0], config, runtime, model)
    check_epoch(data, 'windows', config, runtime, 'lower batch_size or seq_len')
    facts = dict(
        model=config.model,
        model_args=model.config,
        num_classes=model.vocab_size,
        class_names=None,
        seq_len=config.seq_len,
    )
    summary = f'{len(kept)} bytes of {len(kept.parts)} file(s) to train on, {len(held)} to validate on'
    place = partial(_place, packed=windows[1].packed, runtime=runtime)  # each window from an empty state
    return Parts(model, data, validate_sequences(windows[1], config, runtime, place), facts, summary)


def _check(config: Config, runtime: Runtime) -> None:
    if not (config.data_dir or config.data):
        raise UserError('no data: give --data FILE or --data FOLDER, whose bytes are learned')
    for key in ('shard', 'channels_last', 'teacher', 'ema_decay', 'mixup', 'cutmix'):
        if getattr(config, key):
            raise UserError(f'{key} is for images: leave it out of the configuration of a language model')
    if config.carry_state and (config.accumulate > 1 or runtime.world > 1 or config.pack_documents):
        raise UserError('carry_state needs one process, accumulate: 1 and pack_documents: false')


def _create_model(config: Config) -> LanguageModel:
    if config.checkpoint is None and config.model not in PRESETS:
        raise UserError(f'there is no language model {config.model!r}{nearest(config.model, PRESETS)}')
    with as_user_error(f'cannot build {config.model}'):
        if config.checkpoint is not None:
            model = LanguageModel.from_pretrained(config.checkpoint).train()
        else:
            model = create_language_model(config.model, **config.model_args)
    if model.vocab_size < 256:
        raise UserError(f'bytes need a vocabulary of 256, {config.model} has one of {model.vocab_size}')
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def _place(
    inputs: List[Tensor], packed: bool, runtime: Runtime, cache: Optional[List[Any]] = None
) -> Tuple[Tensor, Optional[Tensor], Optional[List[Any]]]:
    """The model's arguments ids, seq_idx and cache."""
    ids, seq_idx = map(runtime.place, inputs)
    return ids, seq_idx if packed else None, cache
