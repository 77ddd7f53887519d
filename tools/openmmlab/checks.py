"""Checks of data, and of models against them, before and during their use."""

from pathlib import Path
from typing import Any, Iterator, Sequence, Tuple

from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from vmamba.tools.user_errors import UserError, listed

from .configs import leaves

IGNORED_LABEL = 255


@HOOKS.register_module()
class CheckHook(Hook):
    """Stops before the first step if folders are missing or the data's classes are not the model's.

    Labels in segmentation maps are known only when an image is loaded, and are checked before the model sees them.
    """

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            check_data(loop.dataloader.dataset, runner.model)

    def before_test(self, runner: Runner) -> None:
        check_data(runner.test_loop.dataloader.dataset, runner.model)

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        check_labels(data_batch['data_samples'], getattr(runner, f'{mode}_loop').dataloader.dataset)


def check_data(dataset: Any, model: nn.Module) -> None:
    """Checks that the folders exist and that the heads have as many classes as the data.

    Raises:
        UserError: If not.
    """
    for leaf in leaves(dataset):
        for prefix in leaf.data_prefix.values():
            if prefix and '://' not in prefix and not Path(prefix).exists():
                raise absent(prefix)
        check_classes(leaf, unwrap(model))


def unwrap(model: nn.Module) -> nn.Module:
    """The detector or segmentor itself, whose names checkpoints have."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def absent(path: Any) -> UserError:
    return UserError(f'there is no {path}; correct the path in the config, or by --cfg-options')


def check_classes(dataset: BaseDataset, model: nn.Module) -> None:
    """Checks the classes of a data set against its annotation file and the heads of the model.

    Raises:
        UserError: If they differ.
    """
    classes = dataset.metainfo['classes']
    known = getattr(dataset, 'cat_ids', classes)  # those of COCO's annotation file
    if len(known) != len(classes):
        raise UserError(f'{dataset.ann_file} has {len(known)} of the {len(classes)} classes: {listed(classes, 5)}')
    for name, count in class_counts(model):
        if count != len(classes):
            raise UserError(
                f'{name} has num_classes {count}, but the data have {len(classes)} classes: {listed(classes, 5)}'
            )


def class_counts(model: nn.Module) -> Iterator[Tuple[str, int]]:
    """The heads of a model that predict classes of the data, and how many."""
    for name, module in model.named_modules():
        own = [part for part in name.split('.') if not part.isdigit()][-1:]  # a head, or one of a list
        if own and own[0].endswith('head') and own != ['rpn_head']:
            if isinstance(getattr(module, 'num_classes', None), int):
                yield name, module.num_classes


def check_labels(samples: Sequence[Any], dataset: Any) -> None:
    """Checks that the segmentation maps of a batch (with test-time augmentation, of lists) have no unknown labels.

    Raises:
        UserError: If one has.
    """
    classes = len(dataset.metainfo['classes'])
    for sample in samples:
        if isinstance(sample, (list, tuple)):
            check_labels(sample, dataset)
        elif 'gt_sem_seg' in sample:
            labels = sample.gt_sem_seg.data
            wrong = labels[(labels != IGNORED_LABEL) & (labels >= classes)]
            if len(wrong):
                raise UserError(
                    f'{sample.seg_map_path} has label {int(wrong.max())}, but the config has {classes} classes, from 0'
                )


def check_maps(model: nn.Module) -> None:
    """Checks that the neck or the heads take the maps that one of this library's backbones returns.

    Raises:
        UserError: If they take another number of maps, or other channels.
    """
    given = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    neck = getattr(model, 'neck', None)
    for name in ('neck',) if neck is not None else ('decode_head', 'auxiliary_head'):
        taker = getattr(model, name, None)
        channels = getattr(taker, 'in_channels', None)
        channels = [channels] if isinstance(channels, int) else list(channels or ())
        index = getattr(taker, 'in_index', range(len(channels)))
        index = [index] if isinstance(index, int) else list(index)
        fits = all(i < len(given or ()) and given[i] == taken for i, taken in zip(index, channels))
        if given and channels and (not fits or taker is neck and len(channels) != len(given)):  # a neck takes all maps
            raise UserError(
                f'{name} takes maps {index} of {channels} channels, but the backbone, with '
                f'out_indices {tuple(model.backbone.out_indices)}, gives {len(given)} of {given}: correct in_channels '
                'or out_indices'
            )
