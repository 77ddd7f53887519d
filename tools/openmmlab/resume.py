"""Training that resumes exactly.

mmengine restores weights, optimizer, schedules and the order of the images, but no random state: augmentation in the
workers, drop path and the sampling of proposals would differ. Here they depend only on the seed and the step.
"""

from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, find_latest_checkpoint
from torch.utils.data import BatchSampler, Sampler

from vmamba.tools.training.seeding import seed_all
from vmamba.tools.user_errors import UserError

from .checkpoints import read_checkpoint, within
from .runs import add_hook

_DATA, _STEP = range(2)  # what random numbers are for


def seed_everything(*key: int) -> None:
    """Makes all random numbers of this process depend on the key only."""
    seed_all(int(np.random.SeedSequence(key).generate_state(1)[0]))


class SeededIndices(list):
    """Indices of a batch's images; iterating seeds each image by the key and its position."""

    def __init__(self, indices: Sequence[int], key: Tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(self[:]):
            seed_everything(*self.key, position)
            yield index

    def __reduce__(self) -> Tuple[Any, ...]:  # list's own would iterate, in the process that sends the batch
        return SeededIndices, (self[:], self.key)


@DATA_SAMPLERS.register_module()
class SeededBatches:
    """A batch sampler whose batches carry the key of their random numbers.

    Args:
        sampler: Of the images; its seed is that of the batches, too.
        batch_size: Images per batch.
        drop_last: Leave out an incomplete batch at the end of an epoch.
        batches: Config of another batch sampler, for batches that are not simply the next images of the sampler.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, drop_last: bool = False, batches: Optional[dict] = None
    ) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        args = dict(sampler=sampler, batch_size=batch_size)
        self._batches = (
            DATA_SAMPLERS.build(batches, default_args=args) if batches else BatchSampler(drop_last=drop_last, **args)
        )
        self._start = 0

    def skip(self, count: int) -> int:
        """Makes the next iteration start after this many batches; returns the number of its epoch."""
        epoch = 0
        if hasattr(self.sampler, 'epoch'):  # others never end
            epoch, count = divmod(count, len(self))
            self.sampler.set_epoch(epoch)
        self._start = count
        return epoch

    def __iter__(self) -> Iterator[List[int]]:
        start, self._start = self._start, 0
        epoch = getattr(self.sampler, 'epoch', 0)
        for number, indices in enumerate(self._batches):
            if number >= start:
                yield SeededIndices(indices, (self.sampler.seed, get_rank(), _DATA, epoch, number))

    def __len__(self) -> int:
        return len(self._batches)


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds each training step by its number, and lets the data of a resumed training skip what was seen."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            iterator = loop.dataloader_iterator

            def skip(count: int) -> None:
                iterator._epoch = loop.dataloader.batch_sampler.skip(count)

            iterator.skip_iter = skip

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, get_rank(), _STEP, runner.iter)


def make_resumable(cfg: Config) -> None:
    """Makes the training of a config exactly resumable: its seed alone decides all random numbers.

    A resumed training takes the seed of its checkpoint. Without a seed, mmengine draws one and logs it.
    """
    if cfg.get('resume'):
        seed = read_checkpoint(cfg.load_from).get('meta', {}).get('seed')
        if seed is not None:
            cfg.randomness = dict(cfg.get('randomness', {}), seed=seed)
    loader = cfg.train_dataloader
    loader.batch_sampler = dict(
        type='SeededBatches', drop_last=loader.pop('drop_last', False), batches=loader.get('batch_sampler')
    )
    add_hook(cfg, type='SeedHook')


def choose_start(cfg: Config, resume: Union[bool, str, None], fresh: Sequence[str]) -> None:
    """Decides which checkpoint the training resumes from or starts with, if any.

    Args:
        cfg: Of the training.
        resume: A checkpoint to resume from, or whether to do so from the last in the work folder, if there is one.
        fresh: Modules that keep their initial weights when a training starts with a checkpoint.

    Raises:
        UserError: If there are such modules, but no checkpoint.
    """
    if isinstance(resume, str):
        cfg.resume, cfg.load_from = True, resume
    elif resume or cfg.get('resume') and cfg.get('load_from') is None:
        last = find_latest_checkpoint(cfg.work_dir)
        cfg.resume, cfg.load_from = last is not None, last or cfg.get('load_from')
    if fresh:
        cfg.fresh = fresh
        if cfg.get('load_from') is None:
            raise UserError('--fresh says what not to load: name a checkpoint by --cfg-options load_from=CHECKPOINT')
    loaded = cfg.get('load_from') and (cfg.get('resume') or not within('backbone', cfg.get('fresh', ())))
    if loaded and 'pretrained' in cfg.model.get('backbone', {}):
        cfg.model.backbone.pretrained = False  # the checkpoint has these weights
