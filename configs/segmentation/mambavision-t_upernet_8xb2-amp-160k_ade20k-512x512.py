_base_ = './_base_/upernet_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_t'),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
