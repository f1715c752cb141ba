"""Entry point of `torch.hub`: torch.hub.load(REPOSITORY, "glnet", checkpoint=FILE) gives a `predict.Segmenter`."""

from pathlib import Path
from typing import Any

from predict import Segmenter

dependencies = ["cv2", "numpy", "PIL", "torch", "tqdm"]
"""The modules that torch.hub looks for before it loads."""


def glnet(checkpoint: str | Path, **options: Any) -> Segmenter:
    """Load a trained network that segments images of any size, with options of `Segmenter.from_checkpoint`.

    Raises InputError if the file, of this project or released, cannot be used, or options do not fit it.
    """
    return Segmenter.from_checkpoint(checkpoint, **options)
