_base_ = './_base_/mask-rcnn_amp-ms-crop-3x.py'

model = dict(
    backbone=dict(variant='vmamba_s', drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
