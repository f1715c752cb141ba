"""Segmenting any image with trained weights, for `predict.py`."""
