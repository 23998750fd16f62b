"""Generated from proto/ by `python -m csi.generate`."""
