"""Training runs and the evaluation of a data set, for `train_deep_globe.py`."""
