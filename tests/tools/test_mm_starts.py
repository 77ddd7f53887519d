"""What trainings of mmdet's and mmseg's models start with, and how their data resume."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mm_runs import DETECTION
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.registry import MODELS
from mmengine.runner import IterBasedTrainLoop, loops

from vmamba.tools.openmmlab.checkpoints import load_weights
from vmamba.tools.openmmlab.configs import load_config
from vmamba.tools.openmmlab.resume import SeededBatches, SeedHook, choose_start
from vmamba.tools.user_errors import UserError

FRESH = ('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg', 'roi_head.mask_head.conv_logits')


@pytest.fixture(scope='module')
def detector():
    return build()


def build(**classes):
    cfg = load_config(Path(DETECTION))
    for head in ('bbox_head', 'mask_head'):
        cfg.model.roi_head[head].update(classes)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('state', ['missing', 'unexpected'])
def test_only_norms_of_outputs_may_differ(detector, state):
    weights = {key: torch.zeros_like(value) for key, value in detector.state_dict().items()}
    if state == 'missing':
        weights = {key: value for key, value in weights.items() if 'outnorm' not in key}
    else:
        weights['backbone.outnorm9.weight'] = torch.ones(1)
    load_weights(detector, {'state_dict': weights}, 'official.pth')
    assert all(not detector.state_dict()[key].any() for key in weights if 'outnorm' not in key)
    del weights['neck.fpn_convs.0.conv.weight']
    with pytest.raises(UserError, match='pth does not fit MaskRCNN: missing: neck.fpn_convs.0.conv.weight. '):
        load_weights(detector, weights, 'official.pth')


def test_named_modules_keep_their_weights(detector):
    weights = {key: value + 1 for key, value in build(num_classes=5).state_dict().items()}
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(UserError, match='of another shape: roi_head.bbox_head.fc_cls.weight'):
        load_weights(detector, weights, 'five.pth')
    load_weights(detector, weights, 'five.pth', FRESH)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(FRESH) else weights[key]), key
    with pytest.raises(UserError, match="no module or weight 'roi_head.box_head' .*; did you mean roi_head.bbox_head"):
        load_weights(detector, weights, 'five.pth', ['roi_head.box_head'])


def test_a_training_begins_with_what_is_asked_for(tmp_path):
    def start(asked, fresh=(), **settings):
        cfg = Config(dict(work_dir=str(tmp_path), model=dict(), **settings))
        choose_start(cfg, asked, fresh)
        return cfg.get('resume', False), cfg.get('load_from'), tuple(cfg.get('fresh', ()))

    assert start(None) == (False, None, ())
    assert start(True, load_from='coco.pth') == (False, 'coco.pth', ())  # nothing to resume from
    assert start('5.pth', load_from='coco.pth') == (True, '5.pth', ())
    assert start(None, ['head'], load_from='coco.pth') == (False, 'coco.pth', ('head',))
    with pytest.raises(UserError, match='load_from=CHECKPOINT'):
        start(None, ['head'])
    (tmp_path / 'last_checkpoint').write_text('last.pth')
    assert start(True, load_from='coco.pth') == (True, 'last.pth', ())
    assert start(None, resume=True) == (True, 'last.pth', ())


@pytest.mark.parametrize(
    'settings, fetched',
    [
        ({}, True),
        (dict(load_from='a.pth', resume=True, fresh=('backbone',)), False),
        (dict(load_from='a.pth'), False),
        (dict(load_from='a.pth', fresh=('head',)), False),
        (dict(load_from='a.pth', fresh=('backbone',)), True),
    ],
)
def test_weights_that_are_replaced_are_not_fetched(settings, fetched):
    cfg = Config(dict(model=dict(backbone=dict(pretrained='imagenet.pth')), **settings))
    choose_start(cfg, None, ())
    assert cfg.model.backbone.pretrained == ('imagenet.pth' if fetched else False)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index, torch.rand(()).item()


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
@pytest.mark.parametrize('done', [2, 3, 7])
def test_data_resume_where_they_were(sampler, done, monkeypatch):
    monkeypatch.setattr(loops.time, 'sleep', lambda _: None)  # of mmengine's, between epochs

    def batches(done, count):
        order = SeededBatches(sampler(Numbers(), shuffle=True, seed=0), 2)
        loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
        loop.dataloader = torch.utils.data.DataLoader(Numbers(), batch_sampler=order, collate_fn=list)
        loop.dataloader_iterator = loops._InfiniteDataloaderIterator(loop.dataloader)
        SeedHook().before_train(SimpleNamespace(train_loop=loop))
        loop.dataloader_iterator.skip_iter(done)
        return [next(loop.dataloader_iterator) for _ in range(count)]

    assert batches(done, 11 - done) == batches(0, 11)[done:]
