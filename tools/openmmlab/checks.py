"""Checks of data, and of models against them, before and while they are used."""

from pathlib import Path
from typing import Any, Dict, Iterator, Sequence, Tuple

from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from vmamba.tools.user_errors import UserError

IGNORED_LABEL = 255
MAX_NAMES = 5  # of classes in a message


@HOOKS.register_module()
class CheckHook(Hook):
    """Stops before the first step if folders are missing or the data's classes are not the model's.

    Labels in maps of classes are only known when their image is loaded, and are checked before the model sees them.
    """

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        check_data(runner.train_loop.dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            check_data(runner.val_loop.dataloader.dataset, runner.model)

    def before_test(self, runner: Runner) -> None:
        check_data(runner.test_loop.dataloader.dataset, runner.model)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        check_labels(data_batch, runner.train_loop.dataloader.dataset)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        check_labels(data_batch, runner.val_loop.dataloader.dataset)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        check_labels(data_batch, runner.test_loop.dataloader.dataset)


def check_data(dataset: Any, model: nn.Module) -> None:
    """Checks that the folders are there and that the heads have as many classes as the data.

    Raises:
        UserError: If not.
    """
    for leaf in leaves(dataset):
        check_folders(leaf)
        check_classes(leaf, unwrap(model))


def unwrap(model: nn.Module) -> nn.Module:
    """The detector or segmentor itself, whose names checkpoints have."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def leaves(dataset: Any) -> Iterator[BaseDataset]:
    """The data sets under wrappers that repeat or join them."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from leaves(part)


def check_folders(dataset: BaseDataset) -> None:
    for prefix in dataset.data_prefix.values():
        if prefix and '://' not in prefix and not Path(prefix).exists():
            raise absent(prefix)


def absent(path: Any) -> UserError:
    return UserError(f'there is no {path}; correct the path in the config, or by --cfg-options')


def check_classes(dataset: BaseDataset, model: nn.Module) -> None:
    classes = dataset.metainfo['classes']
    known = getattr(dataset, 'cat_ids', classes)  # what COCO's annotation file has of them
    if len(known) != len(classes):
        raise UserError(f'{dataset.ann_file} has {len(known)} of the {len(classes)} classes: {shorten(classes)}')
    for name, count in class_counts(model):
        if count != len(classes):
            raise UserError(
                f'{name} has num_classes {count}, but the data have {len(classes)} classes: {shorten(classes)}'
            )


def shorten(names: Sequence[str]) -> str:
    return ', '.join(names[:MAX_NAMES]) + (', ...' if len(names) > MAX_NAMES else '')


def class_counts(model: nn.Module) -> Iterator[Tuple[str, int]]:
    """The heads of a model that have classes of the data, and how many."""
    for name, module in model.named_modules():
        parent, _, own = name.rpartition('.')
        if own.isdigit():
            own = parent.rpartition('.')[2]
        if own.endswith('head') and own != 'rpn_head' and isinstance(getattr(module, 'num_classes', None), int):
            yield name, module.num_classes


def check_labels(batch: Dict[str, Any], dataset: Any) -> None:
    """Checks that maps of classes have no others than the data set.

    Raises:
        UserError: If one does.
    """
    for sample in samples_of(batch['data_samples']):
        if 'gt_sem_seg' in sample:
            labels, classes = sample.gt_sem_seg.data, len(dataset.metainfo['classes'])
            wrong = labels[(labels != IGNORED_LABEL) & (labels >= classes)]
            if len(wrong):
                raise UserError(
                    f'{sample.seg_map_path} has label {int(wrong.max())}, but the config has {classes} classes, from 0'
                )


def samples_of(samples: Sequence[Any]) -> Iterator[Any]:
    """The samples of a batch; with test-time augmentation, those of each variant in turn."""
    for sample in samples:
        yield from sample if isinstance(sample, (list, tuple)) else (sample,)


def check_maps(model: nn.Module) -> None:
    """Checks that neck or heads take the maps that the backbone gives.

    Raises:
        UserError: If they are of another number or of other channels.
    """
    given = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    if given is None:  # not one of this library's
        return
    for name, taken in maps_taken(model):
        differ = any(i >= len(given) or given[i] != channels for i, channels in taken.items())
        if differ or name == 'neck' and len(taken) != len(given):  # which takes all
            raise UserError(
                f'{name} takes maps {list(taken)} of {list(taken.values())} channels, but the backbone, with '
                f'out_indices {tuple(model.backbone.out_indices)}, gives {len(given)} of {given}: correct in_channels '
                'or out_indices'
            )


def maps_taken(model: nn.Module) -> Iterator[Tuple[str, Dict[int, int]]]:
    """The modules behind the backbone, and the channels of the maps that they take by the maps' numbers."""
    if getattr(model, 'neck', None) is not None:
        channels = getattr(model.neck, 'in_channels', None)
        if isinstance(channels, (list, tuple)):
            yield 'neck', dict(enumerate(channels))
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = getattr(model, name, None)
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            numbers, channels = (getattr(head, key, None) for key in ('in_index', 'in_channels'))
            if isinstance(numbers, int) and isinstance(channels, int):
                yield name, {numbers: channels}
            elif isinstance(numbers, (list, tuple)) and isinstance(channels, (list, tuple)):
                yield name, dict(zip(numbers, channels))
