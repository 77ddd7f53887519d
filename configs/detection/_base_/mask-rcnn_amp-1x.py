"""Mask R-CNN on COCO: AdamW 1e-4, 12 epochs, batch size 8 x 2, bf16."""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['vmamba.mm', 'vmamba.mm.roi_extractor'], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type='StageBackbone', pretrained=True),
    roi_head=dict(
        bbox_roi_extractor=dict(type='Fp32RoIExtractor'),
        mask_roi_extractor=dict(type='Fp32RoIExtractor'),
    ),
)

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    constructor='LayerDecayConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='coco/segm_mAP'))
auto_scale_lr = dict(base_batch_size=16)
