_base_ = './_base_/upernet_amp-160k.py'

model = dict(
    backbone=dict(variant='vssd_micro', drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
train_dataloader = dict(batch_size=4)
