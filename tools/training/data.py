"""Training and validation data: timm's datasets and transforms, in an order that a run can continue."""

import itertools
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vmamba.tools.images.batches import Images, Samples, create_loader, eval_transform, prefetch, useful_workers
from vmamba.tools.images.decoding import image_mode
from vmamba.tools.user_errors import UserError

from .config import Config
from .order import BatchOrder
from .runtime import Runtime
from .seeding import derive_seed, seeded
from .splits import SYNTHETIC


class Batch(NamedTuple):
    """Images [B, C, H, W], labels [B], the images that count, and the weight of their mean loss in the update."""

    images: Tensor
    targets: Tensor
    count: int
    weight: float


class Parts(NamedTuple):
    """What a run begins with."""

    model: nn.Module
    data: Any
    validation: Any
    facts: Dict[str, Any]
    summary: str


class OrderedBatches:
    """Training batches in an order that a run can continue; `place` puts inputs on the device."""

    def __init__(
        self,
        loader: Any,
        order: Any,
        runtime: Runtime,
        samples: Optional[Samples] = None,
        place: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self.loader, self.order, self.runtime, self.samples = loader, order, runtime, samples
        self.place = place or runtime.place
        self.updates_per_epoch = order.updates_per_epoch

    def __len__(self) -> int:
        return self.order.size

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        """The batches of an epoch, from the given update to its end."""
        self.order.go_to(epoch, update)
        for (inputs, targets), (count, weight) in zip(self.loader, self.order.counts()):
            if self.samples:
                self.samples.check()
            yield Batch(self.place(inputs), self.runtime.place(targets), count, weight)


def batch_order(dataset: Dataset, config: Config, runtime: Runtime) -> BatchOrder:
    """The order of the examples of a run."""
    sizes = config.batch_size, config.accumulate, runtime.world, runtime.rank
    return BatchOrder(dataset, *sizes, config.aug_repeats, config.drop_last, config.seed)


def check_epoch(data: OrderedBatches, what: str, config: Config, runtime: Runtime, advice: str) -> None:
    """Raises UserError if an epoch has not enough examples for one update."""
    if data.updates_per_epoch == 0:
        size = config.batch_size * config.accumulate * runtime.world
        raise UserError(f'one update takes {size} {what}, but an epoch has fewer: {advice}')


class Validation:
    """Batches to validate on, from a loader; `size` is their number of examples, `place` as of OrderedBatches."""

    samples = None

    def __init__(self, loader: Any, size: int, runtime: Runtime, place: Optional[Callable[[Any], Any]] = None) -> None:
        self.loader, self.size, self.runtime, self.place = loader, size, runtime, place or runtime.place

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Tuple[None, Any, Tensor]]:
        for inputs, targets in self.loader:
            yield None, self.place(inputs), self.runtime.place(targets)


def validate_sequences(
    dataset: Dataset, config: Config, runtime: Runtime, place: Optional[Callable[[Any], Any]] = None
) -> Validation:
    """Sequences to validate on, each once, shared among the processes."""
    rows, size = range(runtime.rank, len(dataset), runtime.world), config.val_batch_size or config.batch_size
    loader = sequence_loader(dataset, config, runtime, batch_size=size, sampler=rows)
    return Validation(loader, len(dataset), runtime, place)


def sequence_loader(dataset: Dataset, config: Config, runtime: Runtime, **order: Any) -> DataLoader:
    """Batches of sequences, with a sampler and a batch size or a batch sampler."""
    return create_loader(dataset, runtime.device, useful_workers(config.workers), **order)


class IndexedData(OrderedBatches):
    """Batches of a dataset whose images have an index; a run continues at the very image where it stopped."""

    def __init__(self, dataset: Dataset, config: Config, data_config: Dict[str, Any], runtime: Runtime) -> None:
        transform = create_train_transform(config, data_config)
        samples = Samples(dataset, transform, image_mode(config.in_chans), config.skip_bad_images, replace=True)
        order, workers = batch_order(dataset, config, runtime), useful_workers(config.workers)
        if config.cache:
            images = Images(dataset, data_config, config.batch_size, workers, runtime.device, config.skip_bad_images)
            loader = CachedBatches(images, order, config)
        else:
            loader = prefetch(samples, data_config, runtime.device, workers, batch_sampler=order)
        super().__init__(loader, order, runtime, samples)


class CachedBatches:
    """Batches, in an order, of images that are all on the device, preprocessed as for validation; augmented there."""

    def __init__(self, images: Images, order: BatchOrder, config: Config) -> None:
        self.images, self.targets = (torch.cat(parts) for parts in zip(*images.loader))
        images.samples.check()
        self.order, self.config = order, config

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for keys in self.order:
            seeds, indices = zip(*keys)
            chosen = torch.tensor(indices).to(self.targets.device, non_blocking=True)  # does not wait for the GPU
            images = self.images[chosen]
            if self.config.augment:
                images = random_crops(images, self.config, torch.Generator().manual_seed(seeds[0]))
            yield images, self.targets[chosen]


def random_crops(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """Crops of random area, aspect ratio and place, flipped at random, at the size of the images [B, C, H, W]."""

    def draw(least: float, most: float) -> Tensor:
        return torch.empty(len(images)).uniform_(least, most, generator=generator)

    areas, ratios = draw(*config.scale), draw(*map(math.log, config.ratio)).exp()
    theta = torch.zeros(len(images), 2, 3)  # maps the crop to its place, both with coordinates from -1 to 1
    for axis, squares, flip in ((0, areas * ratios, config.hflip), (1, areas / ratios, config.vflip)):
        sides = squares.sqrt().clamp(max=1)
        theta[:, axis, axis] = sides.where(draw(0, 1) >= flip, -sides)
        theta[:, axis, 2] = (1 - sides) * draw(-1, 1)
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode='border', align_corners=False)


class Stream(IterableDataset):
    """The transformed images of a dataset that can only be read in its own order.

    The augmentation of an image follows its place among those of its loading process, and the seeds: the run's, and
    this process's number.
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
        self.samples = None
        self.seeds = config.seed, runtime.rank
        self.stream = Stream(dataset, transform, self.seeds, config.workers)
        self.generator = torch.Generator()  # of what PyTorch seeds the loading processes by
        args = dict(batch_size=config.batch_size, drop_last=True, generator=self.generator, persistent_workers=False)
        self.loader = prefetch(self.stream, data_config, runtime.device, config.workers, **args)
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


class SyntheticData:
    """The same random images on the device for every batch, which leaves the time of the model alone."""

    def __init__(self, config: Config, data_config: Dict[str, Any], num_classes: int, runtime: Runtime) -> None:
        generator = torch.Generator().manual_seed(config.seed + runtime.rank)
        images = torch.randn(config.batch_size, *data_config['input_size'], generator=generator)
        targets = torch.randint(num_classes, (config.batch_size,), generator=generator)
        self.batch = Batch(images.to(runtime.device), targets.to(runtime.device), len(images), 1 / config.accumulate)
        self.samples, self.accumulate = None, config.accumulate
        self.images = config.synthetic_images
        self.updates_per_epoch = self.images // (config.batch_size * config.accumulate * runtime.world)

    def __len__(self) -> int:
        return self.images

    def batches(self, epoch: int, update: int) -> Iterator[Batch]:
        for _ in range((self.updates_per_epoch - update) * self.accumulate):
            yield self.batch._replace(images=self.batch.images.clone())  # mixing changes images in place


def create_validation(
    dataset: Dataset, config: Config, data_config: Dict[str, Any], runtime: Runtime
) -> Union[Images, Validation]:
    """The images to validate on, each once, shared among the processes."""
    size = config.val_batch_size or config.batch_size
    if isinstance(dataset, IterableDataset):
        stream = Stream(dataset, eval_transform(data_config), (config.seed, runtime.rank), config.workers)
        loader = prefetch(stream, data_config, runtime.device, config.workers, batch_size=size)
        return Validation(loader, len(stream), runtime)
    indices = range(runtime.rank, len(dataset), runtime.world)
    sizes = size, config.workers
    images = Images(dataset, data_config, *sizes, runtime.device, config.skip_bad_images, indices)
    if config.cache:
        images.loader = list(images.loader)
    return images


def create_data(
    config: Config, data_config: Dict[str, Any], datasets: List[Dataset], num_classes: int, runtime: Runtime
) -> Tuple[Any, Union[Images, Validation, None]]:
    """Training batches and validation images; synthetic data has nothing to validate on."""
    if config.data == SYNTHETIC:
        train, validation = SyntheticData(config, data_config, num_classes, runtime), None
    else:
        kind = StreamedData if isinstance(datasets[0], IterableDataset) else IndexedData
        if config.cache and kind is StreamedData:
            raise UserError(f'{config.data} is read as a stream, which cannot be cached: set cache to false')
        train = kind(datasets[0], config, data_config, runtime)
        validation = create_validation(datasets[1], config, data_config, runtime)
    check_epoch(train, 'images', config, runtime, 'lower batch_size, or drop_last: false')
    return train, validation


def create_train_transform(config: Config, data_config: Dict[str, Any]) -> Callable:
    """timm's transform without random erasing, which comes after the transfer to the device.

    Raises:
        UserError: If timm knows no such policy.
    """
    names = ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'auto_augment')
    augmentation = {name: getattr(config, name) for name in names}
    own = {**data_config, 'interpolation': config.interpolation, **augmentation, 'is_training': True}
    chosen = own if config.augment else {**data_config, 'is_training': False}
    try:
        transform = create_transform(**chosen, use_prefetcher=True)
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"auto_augment {config.auto_augment!r} is none of timm's policies: {error}; take one such as "
            f'rand-m9-mstd0.5-inc1, augmix-m3 or original, or null for none'
        ) from error
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """Those of a policy within a transform: of RandAugment and AugMix in a list, of AutoAugment in a list of lists."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _operations(part)
    else:
        for name in ('transforms', 'ops', 'policy'):
            yield from _operations(getattr(transform, name, ()))


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """As timm's. At the highest level it leaves no bits, which Pillow refuses from version 13 on: a black image."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
