"""UPerNet with VMamba-T on Cityscapes by mmseg's 80,000 iterations, as a starting point; no figures are published."""

_base_ = './_base_/upernet_amp-160k.py'

crop_size, scale = (512, 1024), (2048, 1024)
train_pipeline, test_pipeline, tta_pipeline = _base_.train_pipeline, _base_.test_pipeline, _base_.tta_pipeline
train_pipeline[1].update(reduce_zero_label=False)
train_pipeline[2].update(scale=scale)
train_pipeline[3].update(crop_size=crop_size)
test_pipeline[1].update(scale=scale)
test_pipeline[2].update(reduce_zero_label=False)
tta_pipeline[1].transforms[2][0].update(reduce_zero_label=False)

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(variant='vmamba_t', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=19),
    auxiliary_head=dict(in_channels=384, num_classes=19),
)

dataset = dict(_delete_=True, type='CityscapesDataset', data_root='data/cityscapes/')
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'), pipeline=train_pipeline, **dataset
    )
)
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'), pipeline=test_pipeline, **dataset
    )
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=80000),
]
auto_scale_lr = dict(base_batch_size=8)
