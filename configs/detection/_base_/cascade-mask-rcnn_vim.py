"""Cascade Mask R-CNN on COCO with Vim: 100 epochs, batch size 64, 1024 x 1024, large-scale jitter, bf16."""

_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmdet::common/lsj-100e_coco-instance.py',
]
custom_imports = dict(imports=['vmamba.mm', 'vmamba.mm.roi_extractor'], allow_failed_imports=False)

image_size = (1024, 1024)
norm_cfg = dict(type='LayerNorm2d', eps=1e-6, autocast=True)
bbox_heads = [
    dict(
        type='Shared4Conv1FCBBoxHead',
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        norm_cfg=norm_cfg,
        roi_feat_size=7,
        num_classes=80,
        reg_class_agnostic=True,
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1 / n, 0.1 / n, 0.2 / n, 0.2 / n]
        ),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
    )
    for n in (1, 2, 3)  # stages
]
model = dict(
    # Training and test images are padded to 1024 x 1024, the size of the position embedding.
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type='VimBackbone',
        drop_path_rate=0.1,
        pretrained=True,
        model_options=dict(img_size=1024),
    ),
    neck=dict(norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_roi_extractor=dict(type='Fp32RoIExtractor'),
        bbox_head=bbox_heads,
        mask_roi_extractor=dict(type='Fp32RoIExtractor'),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# The base config repeats the data four times per epoch: 25 epochs here are 100.
optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.837),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[22, 24], gamma=0.1),
]
