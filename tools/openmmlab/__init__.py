"""What the tools for OpenMMLab's mmdet and mmseg share."""
