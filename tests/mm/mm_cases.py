"""The backbones and the configs made small, and batches of random images for them."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from official import vmamba_maps, vmamba_state
from official_mambavision import mambavision_maps, mambavision_state
from official_vssd import vssd_maps, vssd_state
from torch import nn

import vmamba.mm  # noqa: F401  registers the backbones

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
# Options that make the small variant of a family smaller.
NANO = {
    'vmamba': dict(embed_dim=8, depths=(1, 1, 1, 1)),
    'vim': dict(img_size=32, patch_size=16, stride=16, depth=4, embed_dim=16),
    'mambavision': dict(depths=(1, 1, 2, 2), embed_dim=8, stem_dim=4, num_heads=2, window_size=(4, 3)),
    'vssd': dict(depths=(1, 1, 1, 1), embed_dim=8, num_heads=(2, 2, 4, 4), d_state=6),
}
SMALL = dict(embed_dim=8, depths=(1, 1, 2, 1))
SMALL_V0 = dict(embed_dim=8, depths=(1, 1, 1, 1))
SMALL_VIM = dict(img_size=32, patch_size=16, embed_dim=24, expand=2.0, d_state=16)
# By family: makes official weights with these options; computes the maps [B, h, w, d] of all stages from them.
STAGES = {
    'vmamba': (lambda: vmamba_state(depths=(1, 1, 1, 1)), vmamba_maps),
    'vmamba_v0': (lambda: vmamba_state(depths=(1, 1, 1, 1), v0=True), vmamba_maps),
    'mambavision': (
        mambavision_state,
        lambda state, x: [m.permute(0, 2, 3, 1) for m in mambavision_maps(state, x, windows=(4, 3))],
    ),
    'vssd': (vssd_state, lambda state, x: [m.permute(0, 2, 3, 1) for m in vssd_maps(state, x)]),
}


def vmamba_backbone(variant='vmamba_nano', options=SMALL, **kwargs):
    return MODELS.build(dict(type='VMambaBackbone', variant=variant, model_options=options, **kwargs))


def vim_backbone(depth=4, out_indices=(0, 1, 2, 3), stride=16, **kwargs):
    options = dict(SMALL_VIM, depth=depth, stride=stride)
    return MODELS.build(
        dict(type='VimBackbone', variant='vim_nano', out_indices=out_indices, model_options=options, **kwargs)
    )


def with_random_norms(backbone):
    for name, parameter in backbone.named_parameters():
        if name.startswith('outnorm'):
            nn.init.normal_(parameter, mean=1.0)
    return backbone.eval()


def normalised(backbone, i, x):
    """outnorm{i} of a map [B, h, w, d] as [B, d, h, w], in float64"""
    norm = getattr(backbone, f'outnorm{i}')
    out = F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5)
    return out.permute(0, 3, 1, 2)


def assert_outputs(backbone, state, family='vmamba'):
    """The backbone computes the official maps of the state, through its own norms."""
    backbone.eval()
    x = torch.randn(1, 3, 72, 104)
    maps = STAGES[family][1](state, x)
    with torch.no_grad():
        for i, out in zip(backbone.out_indices, backbone(x), strict=True):
            torch.testing.assert_close(out.double(), normalised(backbone, i, maps[i]), rtol=1e-3, atol=1e-3)


def config_files(folder):
    """Paths of the configs of a folder, those for composed scenes left out."""
    return sorted(path for path in (ROOT / 'configs' / folder).glob('*.py') if not path.stem.endswith('_scenes'))


@cache
def _load_config(path):
    return Config.fromfile(path)


def load_config(path):
    return deepcopy(_load_config(str(path)))


def small_config(path):
    """A config whose model has a small backbone and few channels and classes."""
    config = load_config(path)
    model = config.model
    channels = _shrink_backbone(model)
    shrink = {'DINO': _shrink_dino, 'EncoderDecoder': _shrink_segmentor}.get(model.type, _shrink_two_stage)
    shrink(model, channels)
    return config


def small_model(path):
    config = small_config(path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def _shrink_backbone(model):
    backbone = model.backbone
    family = backbone.variant.partition('_')[0]
    backbone.variant = f'{family}_nano'
    backbone.model_options = NANO[family]
    backbone.pretrained = None
    if family == 'vim':
        backbone.out_indices = (0, 1, 2, 3)
        return [16] * 4
    return [8 * 2**i for i in backbone.get('out_indices', range(4))]


def _shrink_two_stage(model, channels):
    model.neck.update(in_channels=channels, out_channels=8)
    model.rpn_head.update(in_channels=8, feat_channels=8)
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 8
    for head in roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]:
        head.update(in_channels=8, fc_out_channels=16, num_classes=CLASSES)
        if 'conv_out_channels' in head:
            head.conv_out_channels = 8
    roi.mask_head.update(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=CLASSES)
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    rcnn = model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.num = 16
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    model.test_cfg.rcnn.update(max_per_img=5, score_thr=0.0)
    if model.data_preprocessor.pad_size_divisor > 128:
        model.data_preprocessor.pad_size_divisor = 128


def _shrink_dino(model, channels):
    model.num_queries = 8
    model.neck.update(in_channels=channels, out_channels=32, norm_cfg=dict(type='GN', num_groups=4))
    for part in (model.encoder, model.decoder):
        part.num_layers = 1
        for name, layer in part.layer_cfg.items():
            layer.embed_dims = 32
            if name == 'ffn_cfg':
                layer.feedforward_channels = 32
    model.positional_encoding.num_feats = 16
    model.bbox_head.update(num_classes=CLASSES, embed_dims=32)
    model.dn_cfg.group_cfg.num_dn_queries = 4
    model.test_cfg.max_per_img = 5


def _shrink_segmentor(model, channels):
    head = model.decode_head
    head.update(in_channels=channels, num_classes=CLASSES)
    model.data_preprocessor.size = (72, 104)
    if head.type == 'UPerHead':
        head.channels = 8
        model.auxiliary_head.update(in_channels=channels[2], channels=8, num_classes=CLASSES)
        if model.test_cfg.mode == 'slide':
            model.test_cfg.update(crop_size=(48, 48), stride=(32, 32))
        return
    head.update(feat_channels=32, out_channels=32, num_queries=6)
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    head.pixel_decoder.norm_cfg.num_groups = 4
    for part in (encoder, decoder):
        part.num_layers = 1
        for layer in part.layer_cfg.values():
            layer.embed_dims = 32
        part.layer_cfg.ffn_cfg.feedforward_channels = 32
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 16
    head.loss_cls.class_weight = [1.0] * CLASSES + [0.1]
    head.train_cfg.num_points = 32


def batch_for(model, sizes=((60, 90), (72, 77)), objects=2):
    """A batch of random images (H, W) with that many objects or with random maps of classes."""
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    make = _map_sample if hasattr(model, 'decode_head') else _box_sample
    return dict(inputs=images, data_samples=[make(size, objects) for size in sizes])


def _map_sample(size, objects):
    from mmseg.structures import SegDataSample

    classes = torch.randint(0, CLASSES, (1, *size)) if objects else torch.full((1, *size), 255)
    sample = SegDataSample(gt_sem_seg=PixelData(data=classes))
    sample.set_metainfo(dict(img_shape=size, ori_shape=size))
    return sample


def _box_sample(size, objects):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    corners = torch.rand(objects, 2) * torch.tensor([width, height]) / 2
    boxes = torch.cat([corners, corners + 10 + torch.rand(objects, 2) * 20], dim=1)
    masks = np.zeros((objects, height, width), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    truth = InstanceData(bboxes=boxes, labels=torch.randint(0, CLASSES, (objects,)))
    truth.masks = BitmapMasks(masks, height, width)
    sample = DetDataSample(gt_instances=truth)
    sample.set_metainfo(dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0, batch_input_shape=size))
    return sample


def losses(model, batch):
    """The parts of the loss, and their sum."""
    data = model.data_preprocessor(batch, True)
    total, parts = model.parse_losses(model(**data, mode='loss'))
    return parts, total


def predictions(model, batch):
    """Image by image, as the test loaders give them."""
    model.eval()
    samples = []
    for image, sample in zip(batch['inputs'], batch['data_samples']):
        data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
        with torch.no_grad():
            samples += model(**data, mode='predict')
    return samples
