"""Training of networks for biomedical segmentation, on MONAI's data sets, losses and metrics."""
