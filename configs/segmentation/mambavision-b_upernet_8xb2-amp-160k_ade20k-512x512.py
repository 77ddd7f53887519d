_base_ = './_base_/upernet_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_b'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
