_base_ = './_base_/cascade-mask-rcnn_vim.py'

model = dict(
    backbone=dict(variant='vim_t'),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
