"""Training and validation data: timm's datasets and transforms, in an order that a run can continue."""

import itertools
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from vmamba.tools.images.decoding import READ_ERRORS, image_mode, read_image, to_mode
from vmamba.tools.user_errors import UserError, listed

from .config import Config
from .order import BatchOrder, Key
from .runtime import Runtime, leave_stopping_to_main
from .seeding import derive_seed, seeded
from .splits import NAMES_SHOWN, SYNTHETIC
from .transforms import create_train_transform

LEFT_OUT = -1  # label of an image that could not be read


class Batch(NamedTuple):
    """Images [B, C, H, W], labels [B], the images that count, and the weight of their mean loss in the update."""

    images: Tensor
    targets: Tensor
    count: int
    weight: float


class Samples(Dataset):
    """A dataset's transformed images, by pairs of the augmentation's seed and the index.

    An unreadable image is marked in `bad`, which loading processes share. If they are to be skipped, the next readable
    one takes its place, or its label is LEFT_OUT; otherwise `check` ends the run.

    Args:
        dataset: With images and labels.
        transform: Of the images.
        config: Settings.
        replace: Whether another image may take the place of one that is skipped.
    """

    def __init__(self, dataset: Dataset, transform: Callable, config: Config, replace: bool = True) -> None:
        dataset.transform = None  # of torchvision's and timm's datasets alike
        self.dataset, self.transform = dataset, transform
        self.mode = image_mode(config.in_chans)
        self.skip_bad = config.skip_bad_images
        self.tries = len(dataset) if self.skip_bad and replace else 1
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Tuple[Any, int]:
        seed, index = key
        image, target = Image.new(self.mode, (1, 1)), LEFT_OUT
        for offset in range(self.tries):
            candidate = (index + offset) % len(self)
            try:
                image, target = self.read(candidate)
                break
            except READ_ERRORS:
                self.bad[candidate] = True
        with seeded(seed):
            return self.transform(image), target

    def read(self, index: int) -> Tuple[Image.Image, int]:
        """The image, decoded, and its label."""
        if isinstance(self.dataset, ImageDataset):  # which would replace what it cannot decode without counting it
            file, target, *_ = self.dataset.reader[index]
            return read_image(file, self.mode), target
        image, target = self.dataset[index]
        return to_mode(image, self.mode), target

    def check(self) -> None:
        """Raises UserError if an unreadable image was met and they are not to be skipped, or if none is readable."""
        if self.skip_bad and self.bad.all():
            raise UserError(f'none of the {len(self)} images can be read, such as {self._name(0, absolute=True)}')
        if not self.skip_bad and self.bad.any():
            index = int(self.bad.nonzero()[0])
            raise UserError(f'{self._describe(index)}; repair or remove it, or give --skip-bad-images')

    def report(self) -> Optional[str]:
        """What was skipped, if there is more of it than the last time."""
        indices = self.bad.nonzero().flatten().tolist()
        if len(indices) == self._reported:
            return None
        self._reported = len(indices)
        names = listed(list(map(self._name, indices)), NAMES_SHOWN)
        return f'skipped {len(indices)} unreadable image(s): {names}'

    def _name(self, index: int, **kwargs: bool) -> str:
        return self.dataset.filename(index, **kwargs) if hasattr(self.dataset, 'filename') else f'image {index}'

    def _describe(self, index: int) -> str:
        path = self._name(index, absolute=True)
        try:
            self.read(index)
        except READ_ERRORS as error:
            return f'{path} cannot be read as an image: {" ".join(str(error).split())}'
        return f'{path} could not be read as an image'


class IndexedData:
    """Batches of a dataset whose images have an index; a run continues at the very image where it stopped."""

    def __init__(self, dataset: Dataset, config: Config, data_config: Dict[str, Any], runtime: Runtime) -> None:
        transform = create_train_transform(config, data_config)
        self.samples = Samples(dataset, transform, config)
        self.order = BatchOrder(
            dataset,
            config.batch_size,
            config.accumulate,
            runtime.world,
            runtime.rank,
            config.aug_repeats,
            config.drop_last,
            config.seed,
        )
        self.updates_per_epoch = self.order.updates_per_epoch
        self.loader = _prefetch(self.samples, config, data_config, runtime, batch_sampler=self.order)

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        """The rest of an epoch, from an update on."""
        self.order.go_to(epoch, update)
        for (images, targets), (count, weight) in zip(self.loader, self.order.counts()):
            self.samples.check()
            yield Batch(images, targets, count, weight)

    def report(self) -> Optional[str]:
        return self.samples.report()


class Stream(IterableDataset):
    """The transformed images of a dataset that can only be read in its own order.

    The augmentation of an image follows its place among those of its loading process.

    Args:
        dataset: With images and labels.
        transform: Of the images.
        seeds: Of the augmentation: the run's, and this process's number.
        workers: Number of loading processes, by which readers share the images out.
    """

    def __init__(self, dataset: IterableDataset, transform: Callable, seeds: Tuple[int, int], workers: int) -> None:
        self.dataset, self.transform, self.seeds = dataset, transform, seeds
        self.epoch = 0
        dataset.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        worker = get_worker_info()
        seeds = *self.seeds, self.epoch, worker.id if worker else 0
        for place, (image, target) in enumerate(self.dataset):
            with seeded(derive_seed(*seeds, place)):
                image = self.transform(image)
            yield image, target


class StreamedData:
    """Batches of a dataset that can only be read in its own order (TFDS, WebDataset, streamed Hugging Face data).

    A run continues by reading and discarding what it had seen of the epoch; the reader decides on the order. Its
    loading processes start again with each epoch, seeded by it, so that what readers shuffle follows from nothing else.
    """

    def __init__(self, dataset: IterableDataset, config: Config, data_config: Dict[str, Any], runtime: Runtime) -> None:
        if config.aug_repeats > 1:
            raise UserError(f'{config.data} is read as a stream, which cannot repeat images: set aug_repeats to 1')
        if config.skip_bad_images:
            raise UserError(f'{config.data} is read as a stream, which can skip no images: leave skip_bad_images out')
        transform = create_train_transform(config, data_config)
        self.seeds = config.seed, runtime.rank
        self.stream = Stream(dataset, transform, self.seeds, config.workers)
        self.generator = torch.Generator()  # of what PyTorch seeds the loading processes by
        args = dict(batch_size=config.batch_size, drop_last=True, generator=self.generator, persistent_workers=False)
        self.loader = _prefetch(self.stream, config, data_config, runtime, **args)
        self.accumulate = config.accumulate
        self.updates_per_epoch = len(self.loader) // config.accumulate

    def __len__(self) -> int:
        return len(self.stream)

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        self.stream.dataset.set_epoch(epoch)
        self.stream.epoch = epoch
        self.generator.manual_seed(derive_seed(*self.seeds, epoch))
        steps = slice(update * self.accumulate, self.updates_per_epoch * self.accumulate)
        for images, targets in itertools.islice(self.loader, steps.start, steps.stop):
            yield Batch(images, targets, len(images), 1 / self.accumulate)

    def report(self) -> None:
        return None


class SyntheticData:
    """The same random images, on the device already, time and again: what remains is the time of the model."""

    def __init__(self, config: Config, data_config: Dict[str, Any], num_classes: int, runtime: Runtime) -> None:
        generator = torch.Generator().manual_seed(config.seed + runtime.rank)
        images = torch.randn(config.batch_size, *data_config['input_size'], generator=generator)
        targets = torch.randint(num_classes, (config.batch_size,), generator=generator)
        self.batch = Batch(images.to(runtime.device), targets.to(runtime.device), len(images), 1 / config.accumulate)
        self.accumulate = config.accumulate
        self.images = config.synthetic_images
        self.updates_per_epoch = self.images // (config.batch_size * config.accumulate * runtime.world)

    def __len__(self) -> int:
        return self.images

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        for _ in range((self.updates_per_epoch - update) * self.accumulate):
            yield self.batch._replace(images=self.batch.images.clone())  # mixing changes images in place

    def report(self) -> None:
        return None


class Validation:
    """All readable images of the validation split, each once, shared out among the processes."""

    def __init__(self, dataset: Dataset, config: Config, data_config: Dict[str, Any], runtime: Runtime) -> None:
        self.dataset = dataset
        batch_size = config.val_batch_size or config.batch_size
        transform = create_transform(**data_config, is_training=False, use_prefetcher=True)
        if isinstance(dataset, IterableDataset):
            self.samples = None
            stream = Stream(dataset, transform, (config.seed, runtime.rank), config.workers)
            self.loader = _prefetch(stream, config, data_config, runtime, batch_size=batch_size)
            return
        self.samples = Samples(dataset, transform, config, replace=False)
        keys = [(0, index) for index in range(runtime.rank, len(dataset), runtime.world)]
        args = dict(sampler=keys, batch_size=batch_size)
        self.loader = _prefetch(self.samples, config, data_config, runtime, **args)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, targets in self.loader:
            if self.samples:
                self.samples.check()
                if self.samples.skip_bad:
                    readable = targets != LEFT_OUT
                    images, targets = images[readable], targets[readable]
            if len(targets):
                yield images, targets

    def report(self) -> Optional[str]:
        return self.samples.report() if self.samples else None


def _prefetch(
    samples: Union[Samples, Stream], config: Config, data_config: Dict[str, Any], runtime: Runtime, **loader_args: Any
) -> PrefetchLoader:
    """Batches that are copied to the device, and normalised there, while the model is at work on the one before."""
    loader = DataLoader(
        samples,
        num_workers=config.workers,
        collate_fn=fast_collate,
        pin_memory=runtime.device.type == 'cuda',
        worker_init_fn=leave_stopping_to_main,
        **{'persistent_workers': config.workers > 0, **loader_args},
    )
    normalisation = {name: data_config[name] for name in ('mean', 'std')}
    return PrefetchLoader(loader, channels=config.in_chans, device=runtime.device, **normalisation)


def create_data(
    config: Config, data_config: Dict[str, Any], datasets: List[Dataset], num_classes: int, runtime: Runtime
) -> Tuple[Any, Optional[Validation]]:
    """Training batches and validation images; synthetic data has nothing to validate on."""
    if config.data == SYNTHETIC:
        train, validation = SyntheticData(config, data_config, num_classes, runtime), None
    else:
        kind = StreamedData if isinstance(datasets[0], IterableDataset) else IndexedData
        train = kind(datasets[0], config, data_config, runtime)
        validation = Validation(datasets[1], config, data_config, runtime)
    if train.updates_per_epoch == 0:
        size = config.batch_size * config.accumulate * runtime.world
        raise UserError(f'an epoch has fewer images than an update of {size}: lower batch_size, or drop_last: false')
    return train, validation
