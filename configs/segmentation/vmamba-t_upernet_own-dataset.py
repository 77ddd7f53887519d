"""UPerNet with VMamba-T on your own images, with masks in folders: 20,000 iterations with crops of 512 x 512.

Copy it by `vmamba configs copy vmamba-t_upernet_own-dataset --output my_configs`, and edit the two lines below. The
folder needs images/train/NAME.jpg with masks/train/NAME.png, and the same for val. The pixels of a mask are numbers of
classes from 0; 255 is ignored.
"""

_base_ = './vmamba-t_upernet_8xb2-amp-160k_ade20k-512x512.py'

data_root = 'data/own/'
classes = ('background', 'object')

model = dict(decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes)))

# Masks are read as they are: ADE20K's have 0 where nothing is labelled.
train_pipeline, test_pipeline, tta_pipeline = _base_.train_pipeline, _base_.test_pipeline, _base_.tta_pipeline
train_pipeline[1].update(reduce_zero_label=False)
test_pipeline[2].update(reduce_zero_label=False)
tta_pipeline[1].transforms[2][0].update(reduce_zero_label=False)

dataset = dict(_delete_=True, type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'), pipeline=train_pipeline, **dataset
    )
)
val_dataloader = dict(
    dataset=dict(data_prefix=dict(img_path='images/val', seg_map_path='masks/val'), pipeline=test_pipeline, **dataset)
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=20000),
]
