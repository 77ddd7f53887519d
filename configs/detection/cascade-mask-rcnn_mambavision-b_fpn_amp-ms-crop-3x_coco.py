_base_ = './_base_/cascade-mask-rcnn_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_b'),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
