"""The library: a trained network that segments images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset.deep_globe import DEEP_GLOBE
from engine.predictor import Predictor
from imaging.image_file import View, open_image
from imaging.pictures import array, picture
from imaging.sources import CheckedSource, Source
from models import checkpoint
from models.backbone import check_backbone
from models.glnet import GLNet
from models.header import Header
from models.restore import header_for, restore
from prediction.scenes import SCENE_SIZE, Emit, Rows, patch_count, segment_scenes
from utils import distributed
from utils.classes import Classes
from utils.errors import InputError
from utils.precision import resolve_precision
from utils.settings import RECORDED, check_sizes
from utils.stages import STAGES
from utils.stretch import Stretch, bands_of, fit_bands, spell_bands
from utils.tiling import Box
from utils.turns import TURNS


class Cancelled(Exception):
    """The caller cancelled `Segmenter.segment_to`; the sink got some rows, or none."""


class Segmenter:
    """A trained network that segments images of any size.

    Attributes:
        predictor: segments one scene.
        header: what the checkpoint records, and the values that replaced it.
        scene_size: images with a longer side, in pixels, are segmented as overlapping scenes of at most this side;
            with `--context scale` without influence.
    """

    def __init__(self, predictor: Predictor, header: Header, scene_size: int = SCENE_SIZE) -> None:
        self.predictor = predictor
        self.header = header
        self.scene_size = scene_size

    @property
    def classes(self) -> Classes:
        """What the ids mean, and their colours."""
        return self.header.classes

    @property
    def view(self) -> View:
        """How files become 8-bit bands, unless a call says otherwise: as in training."""
        return View.parse(self.header.bands, self.header.stretch)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        path_g: str | Path | None = None,
        mode: int | None = None,
        precision: str = "fp32",
        tta: str = "none",
        sub_batch_size: int = 6,
        scene_size: int | None = None,
        view_pixels: int | None = None,
        refine_share: float = 1.0,
        blend: str = "none",
        upsample: str = "nearest",
        **recorded: Any,
    ) -> "Segmenter":
        """Load a trained network.

        Args:
            path: a checkpoint of this project, or a released one.
            device: `cpu`, `cuda`, `cuda:1`, ...; by default CUDA if there is any, else the CPU.
            path_g: stage 1's file, which a released file of stage 3 needs beside it.
            mode: 1 global, 2 global to local, 3 local to global; by default the file's stage. A released file needs it.
            precision: `fp32`, `bf16`, `fp16`, or `auto`: bf16 where the device has instructions for it, else fp32.
            tta: `none`, `flip` or `d4`: average over mirrored, or all turned, images.
            sub_batch_size: patches that are computed at a time.
            scene_size: images with a longer side, in pixels, are segmented as overlapping scenes of at most this side;
                by default 5000. Not with the context `scale`.
            view_pixels: with the context `scale`: images whose shrunk image has more pixels are segmented as
                overlapping scenes whose shrunk images have at most so many; by default 2359296.
            refine_share: the local branch computes only this part of the patches, 0..1, those in which the global
                prediction is least certain; elsewhere the global prediction stands.
            blend: `none`, `linear` or `gaussian`: the weights of a patch's scores, by the distance to its borders.
            upsample: `nearest` or `bilinear`: how logits are enlarged to pixels.
            recorded: values that replace what the file records, by the names of `utils.settings.RECORDED`: `size_g`,
                `size_p`, `min_overlap`, `backbone`, `normalize`, `coarse_to_fine`, `box_margin`, `bands` (`3,2,1`),
                `stretch` (`2%,98%` or `0,10000`), `context` (`square` or `scale`). None replaces nothing.

        Raises:
            InputError: a file cannot be used, or options do not fit it.
            TypeError: another keyword is given.
        """
        if unknown := recorded.keys() - RECORDED.keys():
            raise TypeError(f"from_checkpoint() has no keyword {min(unknown)!r}; there are {', '.join(RECORDED)}")
        if recorded.get("bands") is not None:
            recorded["bands"] = spell_bands(bands_of(recorded["bands"]))
        if recorded.get("stretch") is not None:
            recorded["stretch"] = str(Stretch.of(recorded["stretch"]))
        model, header = load_network(path, path_g, mode, recorded)
        context = header.context_scale(view_pixels)
        if scene_size is not None and header.context == "scale":
            raise InputError(f"--scene_size {scene_size} goes with --context square; here --view_pixels bounds scenes")
        place = distributed.pick_device(None if device is None else str(device))
        settings = header.settings(
            refine_share=refine_share,
            blend=blend,
            upsample=upsample,
            sub_batch_size=sub_batch_size,
            device=place,
            precision=resolve_precision(precision, place),
        )
        predictor = Predictor.prepare(model, STAGES[header.stage], settings, header.size_g, TURNS[tta], context)
        return cls(predictor, header, SCENE_SIZE if scene_size is None else scene_size)

    def segment(
        self,
        image: str | Path | Image.Image | np.ndarray,
        bands: Sequence[int] | str | None = None,
        stretch: Stretch | str | None = None,
    ) -> np.ndarray:
        """Segment one image.

        Args:
            image: a file, a Pillow image, or an array (H, W, 3) or (H, W) uint8, 0..255, RGB or grey. Where bands are
                named, here or in the checkpoint, an array is (H, W, bands) with all bands of a file, uint8 or other
                whole or floating-point numbers, which are stretched. Masked pixels have no data.
            bands: the numbers, from 1, of the bands that the network reads, as (3, 2, 1) or `3,2,1`; by default the
                checkpoint's.
            stretch: which values of pixels of more than 8 bits become 0 and 255, as `2%,98%` or `0,10000`; by default
                the checkpoint's.

        Returns:
            (H, W) uint8 class ids, the headline's; 255 where the image has no data.

        Raises:
            InputError: bands or stretch are none, or the image cannot be read, lacks bands, is of another type or
                shape, or is empty; or the scores are not finite numbers.
        """
        view = self.view
        if bands is not None:
            view = replace(view, bands=fit_bands(bands_of(bands), self.header.n_bands, "the checkpoint"))
        if stretch is not None:
            view = replace(view, stretch=Stretch.of(stretch))
        if isinstance(image, str | Path):
            with open_image(image, view) as source:
                return self._segment(source, image)
        if isinstance(image, np.ndarray):
            return self._segment(array(image, view))
        if not isinstance(image, Image.Image):
            raise InputError(
                f"an image must be a file's path, a Pillow image or an array (H, W, bands) or (H, W), not a "
                f"{type(image).__name__}; a tensor (bands, H, W) becomes one by .permute(1, 2, 0).cpu().numpy()"
            )
        return self._segment(picture(image, view))

    def segment_to(
        self,
        source: Source,
        sink: Emit,
        *,
        probabilities: bool = False,
        uncertainty: bool = False,
        on_progress: Callable[[int, int | None], object] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Segment an image that need not fit in memory, nor need its result.

        Args:
            source: the image; see `imaging.sources.Source`.
            sink: gets finished rows from the top of the image to its bottom, each once: `sink(top, rows)`, where `top`
                is the first row's number and `rows.ids` are (n, W) uint8 class ids, 255 where the source has no data.
            probabilities: whether `rows.probabilities` are the classes' probabilities, (n_class, n, W) float16, not a
                number where the source has no data; by default they are None.
            uncertainty: whether `rows.uncertainty` is (2, n, W) uint8, 0..255, of `prediction.uncertainty.BANDS`, in
                mode 1 (1, n, W), 0 where the source has no data; by default it is None.
            on_progress: called as `on_progress(done, total)` after each sub-batch, with numbers of patches; `total` is
                None if the pixels decide which patches are computed. In mode 1, which has no patches, rows are counted.
            is_cancelled: called after each sub-batch and before rows go to the sink; if it returns true, Cancelled is
                raised.

        Raises:
            InputError: the source is empty, has other bands than the network, or returns anything but the pixels that
                are asked for; or the scores are not finite numbers.
            Cancelled: `is_cancelled` returned true. What other callbacks raise is passed on, too: give a result its
                name only after this call.
        """
        if source.n_bands != self.header.n_bands:
            raise InputError(f"the source has {source.n_bands} bands and the network reads {self.header.n_bands}")
        if min(source.size) < 1:
            raise InputError(f"the source is empty: its size is {source.size}")
        by_rows = self.predictor.stage.number == 1
        total = source.size[0] if by_rows else patch_count(self.predictor, source.size, self.scene_size)
        done = 0

        def check() -> None:
            if is_cancelled is not None and is_cancelled():
                raise Cancelled("segmenting was cancelled")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            check()
            if on_progress is not None:
                on_progress(done, total)

        def emit(top: int, rows: Rows) -> None:
            check()
            sink(top, rows)
            if by_rows:
                advance(len(rows.ids))

        self._send(
            CheckedSource(source), emit, probabilities=probabilities, uncertainty=uncertainty, on_patches=advance
        )

    def _segment(self, source: Source, name: object = "the image") -> np.ndarray:
        ids = np.empty(source.size, np.uint8)

        def keep(top: int, rows: Rows) -> None:
            ids[top : top + len(rows.ids)] = rows.ids.numpy()

        self._send(source, keep, name=name)
        return ids

    def _send(self, source: Source, sink: Emit, **more: Any) -> None:
        """Send the result's rows to a sink, without those of pixels that have no data; see `segment_scenes`."""

        def emit(top: int, rows: Rows) -> None:
            rows.leave_out(source.valid(Box(top, 0, *rows.ids.shape)))
            sink(top, rows)

        segment_scenes(self.predictor, source, emit, scene_size=self.scene_size, **more)


def load_network(
    path: str | Path, path_g: str | Path | None, mode: int | None, given: Mapping[str, Any]
) -> tuple[GLNet, Header]:
    """Load a trained network for one mode; see `Segmenter.from_checkpoint`, whose `recorded` are `given` here.

    Returns the plain network in evaluation mode, on the CPU, and its header. Raises InputError if a file cannot be
    used, or values do not fit it.
    """
    file = checkpoint.read(path)
    header = header_for(file, mode, given, released=DEEP_GLOBE)
    check_sizes(header.size_g, header.size_p, header.min_overlap)
    check_backbone(header.backbone, header.size_g, header.size_p)
    context = checkpoint.read_context(file, header.stage, None if path_g is None else Path(path_g))
    return restore(file, header, context), header
