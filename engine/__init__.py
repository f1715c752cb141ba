"""The way of an image through the network: patches, training step and inference of each stage, the predictor."""
