"""UPerNet on ADE20K with MambaVision: AdamW 5e-5. The backbones' weights are for non-commercial use."""

_base_ = './upernet_amp-160k.py'

model = dict(
    backbone=dict(
        # The official configs set 0.3, 0.7, 0.4 and 0.8 (T, S, B, L3), which their backbone ignores: all ran with 0.2.
        drop_path_rate=0.2,
        model_options=dict(window_size=(64, 32)),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
