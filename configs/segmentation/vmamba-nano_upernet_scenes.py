"""UPerNet with VMamba-nano from scratch on the scenes of tools/make_scenes.py; minutes on two CPU cores."""

_base_ = './_base_/upernet.py'

data_root = 'data/scenes/'
classes = ('photograph', 'zero', 'one', 'two')
norm_cfg = dict(type='BN', requires_grad=True)
channels = 64
class_weight = [0.5, 1.0, 1.0, 1.0]  # digits cover few pixels and would be learned late

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(type='VMambaBackbone', variant='vmamba_nano'),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=channels,
        dropout_ratio=0.0,
        num_classes=len(classes),
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=channels,
        dropout_ratio=0.0,
        num_classes=len(classes),
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
test_pipeline = train_pipeline
dataset = dict(
    type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes), reduce_zero_label=True, _delete_=True
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader

max_iters = 500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayerDecayConstructor',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, T_max=max_iters - 50),
]
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
