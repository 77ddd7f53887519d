_base_ = './_base_/cascade-mask-rcnn_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_t'),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
