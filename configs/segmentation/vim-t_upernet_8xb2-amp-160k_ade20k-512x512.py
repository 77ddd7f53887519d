_base_ = './_base_/upernet_vim_160k.py'

model = dict(
    backbone=dict(variant='vim_t'),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
)
