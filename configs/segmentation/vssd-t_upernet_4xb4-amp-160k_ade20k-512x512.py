_base_ = './_base_/upernet_amp-160k.py'

model = dict(
    backbone=dict(variant='vssd_t', drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
train_dataloader = dict(batch_size=4)
