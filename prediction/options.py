"""The command line of `predict.py`: each option with its type, bounds, default and help."""

from pathlib import Path

from models.backbone import BACKBONES
from prediction.polygon_options import KINDS, Quantity
from prediction.scenes import OVERLAPS_PER_SCENE, SCENE_SIZE
from prediction.stability import MOST_CUTS
from utils.arguments import (
    Parser,
    add_coarse_to_fine,
    add_context,
    add_geometry,
    add_normalize,
    add_precision,
    add_refine_share,
    add_smoothing,
    add_view,
    whole,
)
from utils.turns import TURNS


def build_parser() -> Parser:
    """Return the parser of `predict.py`."""
    parser = Parser(prog="predict.py", description="Segment images of any kind and size with trained weights.")
    add = parser.group("files")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="trained network, of this project or released")
    add("--path_g", type=Path, metavar="FILE", help="stage 1's file, which a released file of mode 3 needs beside it")
    add("--input", nargs="+", required=True, metavar="IMAGE|FOLDER|GLOB", help="images to segment")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    add(
        "--overwrite",
        action="store_true",
        help="replace existing results; without it they are kept, and a stopped run continues",
    )
    add = parser.group("results")
    add("--overlay", action="store_true", help="also the colours over the image, with a legend")
    add("--probabilities", action="store_true", help="also the classes' probabilities, as float16 in .npz or .tif")
    add(
        "--uncertainty",
        action="store_true",
        help="also where the prediction is unsure: its entropy, and where global and local prediction disagree, 8 bits",
    )
    add(
        "--stability",
        type=whole(1, MOST_CUTS),
        default=0,
        metavar="N",
        help="also in how many of N shifted cuts of the image classes change, in N + 1 times the time (default: none)",
    )
    add("--colors", action="store_true", help="masks in RGB instead of class ids")
    add("--cog", action="store_true", help="masks as cloud-optimised GeoTIFFs, with overviews; needs rasterio")
    add = parser.group("polygons")
    add(
        "--polygons",
        choices=KINDS,
        help="also the connected regions of the mask as polygons, in a GeoPackage or in GeoJSON (WGS 84);\n"
        "needs pyogrio and shapely (default: none)",
    )
    add(
        "--min_area",
        type=Quantity.parse,
        metavar="AREA",
        help="leave out smaller regions, of so many pixels or square metres: 50px, 50m2 (default: none)",
    )
    add_view(parser.group("reading"))
    add = parser.group("network and geometry")
    add(
        "--mode",
        type=int,
        choices=(1, 2, 3),
        help="1: global branch alone; 2: global to local; 3: local to global (default: the checkpoint's stage; a\n"
        "released file needs it)",
    )
    add_geometry(add)
    add_context(add)
    add(
        "--scene_size",
        type=whole(2 * OVERLAPS_PER_SCENE),
        help="with --context square: images with a longer side are segmented as overlapping scenes of at most this\n"
        f"side, each with a global context of its own (default: {SCENE_SIZE})",
    )
    add(
        "--tta",
        choices=tuple(TURNS),
        default="none",
        help="average over the image and its mirror image (flip), or over all its eight turns (d4) (default: none)",
    )
    add("--backbone", choices=BACKBONES, help="encoder of a released file (default: resnet50)")
    add_normalize(add)
    add_precision(add)
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add_coarse_to_fine(parser.group("coarse to fine"))
    add_refine_share(parser.group("uncertain patches"))
    add_smoothing(parser.group("seams and edges"))
    return parser
