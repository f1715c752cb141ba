"""Segmenting any image with trained weights: what only `predict.py` uses."""
