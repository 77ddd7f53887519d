_base_ = './_base_/mask-rcnn_amp-1x.py'

model = dict(
    backbone=dict(variant='vssd_t', drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
