"""Windows of large images, which training uses as images of their own: how many there are, and where they lie."""

from dataclasses import dataclass

from utils.tiling import Box, Size


@dataclass(frozen=True)
class Windows:
    """Squares that are cut from every image that is longer than they are in either side; others stay whole.

    Attributes:
        size: their side, in pixels (`--window`).
        count: how many an epoch draws from each such image (`--windows`).
    """

    size: int
    count: int

    def cuts(self, image: Size) -> bool:
        """Return whether an image of size `image` is cut."""
        return max(image) > self.size

    def clip(self, image: Size) -> Size:
        """Return the size of the windows of an image of size `image`; its own where it is not cut."""
        return min(self.size, image[0]), min(self.size, image[1])

    def place(self, image: Size, position: tuple[float, float], scale: float = 1.0) -> tuple[Box, Size]:
        """Place one window.

        Args:
            image: (height, width) of the image, in pixels.
            position: where the window lies between the first and the last possible row and column, in [0, 1) each.
            scale: by which factor the window is enlarged after it is read: 2 reads half as many rows and columns.

        Returns:
            A box within the image, no longer than the image in either side, and its size when it is enlarged: `size`
            in both sides, less where the image is too short.
        """
        side = max(1, round(self.size / scale))
        height, width = (min(side, whole) for whole in image)
        top = int(position[0] * (image[0] - height + 1))
        left = int(position[1] * (image[1] - width + 1))
        sizes = (self.size if own == side else min(self.size, enlarged(own, scale)) for own in (height, width))
        return Box(top, left, height, width), (next(sizes), next(sizes))


def enlarged(side: int, scale: float) -> int:
    """Return `side` pixels times `scale`, at least 1."""
    return max(1, round(side * scale))
