_base_ = './_base_/cascade-mask-rcnn_vim.py'

model = dict(
    backbone=dict(variant='vim_s'),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
