"""Which images are in which batch: a function of the seed, the epoch and the place in it."""

from typing import Iterator, List, Sized, Tuple

from timm.data.distributed_sampler import RepeatAugSampler

from .seeding import derive_seed

Key = Tuple[int, int]


class BatchOrder:
    """Batch sampler of one process, which can start at any update of any epoch.

    Each update uses the next `batch_size * accumulate * world` images of the epoch's order, shared among processes and
    steps. So updates see the same images for any factors of this product. An image is a pair of the seed of its
    augmentation and its index.

    Images may be repeated with other augmentation; the epoch keeps its length. `drop_last` leaves out a last update of
    fewer images.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        repeats: int = 1,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        self.parts, self.accumulate, self.world, self.rank = accumulate * world, accumulate, world, rank
        self.seed, self.size = seed, len(dataset)
        self.update_size = batch_size * self.parts
        # The sampler orders all images; the processes' shares are cut from the updates.
        self.sampler = RepeatAugSampler(dataset, 1, 0, num_repeats=repeats, selected_round=0)
        whole, rest = divmod(self.size, self.update_size)
        self.updates_per_epoch = whole + bool(rest and not drop_last)
        self.last_size = self.update_size if drop_last or not rest else rest
        self.go_to(0, 0)

    def go_to(self, epoch: int, update: int) -> None:
        """The next iteration begins at this update of this epoch."""
        self.epoch, self.update = epoch, update

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.update) * self.accumulate

    def __iter__(self) -> Iterator[List[Key]]:
        self.sampler.set_epoch(derive_seed(self.seed, self.epoch))
        order = list(self.sampler)
        for update in range(self.update, self.updates_per_epoch):
            places = range(update * self.update_size, update * self.update_size + self._size(update))
            for step in range(self.accumulate):
                # A process without an image takes one of weight 0, because all have to take part in the update.
                own = places[step * self.world + self.rank :: self.parts] or places[:1]
                yield [(derive_seed(self.seed, self.epoch, place), order[place]) for place in own]

    def counts(self) -> Iterator[Tuple[int, float]]:
        """For every batch its images that count, and the factor that makes its mean loss a part of the update's.

        Gradients are summed over the steps of a process and averaged over the processes.
        """
        for update in range(self.update, self.updates_per_epoch):
            size = self._size(update)
            for step in range(self.accumulate):
                own = len(range(step * self.world + self.rank, size, self.parts))
                yield own, own * self.world / size

    def _size(self, update: int) -> int:
        return self.last_size if update == self.updates_per_epoch - 1 else self.update_size
