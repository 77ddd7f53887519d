_base_ = './_base_/upernet_vim_160k.py'

model = dict(
    backbone=dict(variant='vim_s'),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
