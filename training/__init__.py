"""Training runs and the evaluation of a data set: what only `train_deep_globe.py` uses."""
