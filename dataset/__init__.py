"""Images, labels and the published splits."""
