"""One image's way through the network: patches, each stage's training step and inference, the predictor."""
