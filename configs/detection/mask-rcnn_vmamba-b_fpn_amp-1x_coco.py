_base_ = './_base_/mask-rcnn_amp-1x.py'

model = dict(
    backbone=dict(variant='vmamba_b', drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
