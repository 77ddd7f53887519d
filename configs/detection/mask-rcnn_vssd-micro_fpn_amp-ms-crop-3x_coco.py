_base_ = './_base_/mask-rcnn_amp-ms-crop-3x.py'

model = dict(
    backbone=dict(variant='vssd_micro', drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
