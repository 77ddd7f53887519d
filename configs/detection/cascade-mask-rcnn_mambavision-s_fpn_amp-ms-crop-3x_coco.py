_base_ = './_base_/cascade-mask-rcnn_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_s'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
