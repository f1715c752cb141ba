"""Draws the network, docs/network.svg: python -m scripts.draw_network"""

from itertools import pairwise
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "network.svg"

WIDTH, HEIGHT = 1020, 470
GLOBAL, LOCAL = 130, 360
"""Heights of the middle of the two branches."""

INK, GREY = "#222222", "#777777"
BRANCH = {GLOBAL: "#2b6cb0", LOCAL: "#c05621"}
PALE = {GLOBAL: "#dbe9f6", LOCAL: "#fbe3d3"}

LEVELS = [("c2", 170, 96), ("c3", 216, 72), ("c4", 262, 50), ("c5", 308, 30)]
LEVELS += [("p5", 394, 30), ("p4", 440, 50), ("p3", 486, 72), ("p2", 532, 96)]
"""Name, left side and height of each level's map: of the encoder, then of the pyramid."""

BAR, PS3 = 22, 640


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 14, color: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{line}"/>'


def arrow(*points: tuple[float, float], color: str = INK, dash: str = "") -> str:
    """Return a line through the points (x, y) with a head at its end, which must be level or upright."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    head = [(x, y), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)]
    path, tip = (" ".join(f"{a},{b}" for a, b in corners) for corners in (points, head))
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
        f'<polygon points="{tip}" fill="{color}"/>'
    )


def branch(middle: int) -> list[str]:
    """Return input, encoder, pyramid, last map, head and prediction of the branch at a height."""
    color, pale = BRANCH[middle], PALE[middle]
    shapes = [box(x, middle - height / 2, BAR, height, pale, color) for _, x, height in LEVELS]
    shapes += [text(x + BAR / 2, middle + 5, name, size=12) for name, x, _ in LEVELS]
    ends = [*[(x, x + BAR) for _, x, _ in LEVELS], (PS3, PS3 + BAR), (740, 810)]
    shapes += [arrow((left[1], middle), (right[0], middle)) for left, right in pairwise(ends)]
    shapes += [arrow((110, middle), (170, middle)), arrow((810, middle), (860, middle))]
    shapes += [box(PS3, middle - 60, BAR, 120, color, color), text(PS3 + 11, middle + 5, "ps3", size=11, color="white")]
    shapes += [box(740, middle - 18, 70, 36, "white", color), text(775, middle + 5, "3 x 3")]
    return shapes


def draw() -> str:
    """Return the drawing as SVG."""
    shapes = [box(0, 0, WIDTH, HEIGHT, "white", "white")]
    shapes += [text(251, 36, "encoder"), text(475, 36, "pyramid: ps0, ps1, ps2")]
    shapes += [text(16, 36, "global branch", "start", 16, BRANCH[GLOBAL])]
    shapes += [text(16, 452, "local branch", "start", 16, BRANCH[LOCAL])]
    shapes += branch(GLOBAL) + branch(LOCAL)

    shapes += [box(26, GLOBAL - 42, 84, 84, PALE[GLOBAL], BRANCH[GLOBAL])]
    shapes += [text(68, GLOBAL - 4, "image,"), text(68, GLOBAL + 14, "shrunk")]
    shapes += [box(26 + k, LOCAL - 38 - k, 76, 76, PALE[LOCAL], BRANCH[LOCAL]) for k in (8, 4, 0)]
    shapes += [text(64, LOCAL - 10, "patches,"), text(64, LOCAL + 7, "full"), text(64, LOCAL + 24, "resolution")]

    for _, x, height in LEVELS:  # at every level, in both directions
        top, bottom = GLOBAL + height / 2, LOCAL - height / 2
        shapes += [arrow((x + 6, top), (x + 6, bottom), color=BRANCH[GLOBAL])]
        shapes += [arrow((x + 16, bottom), (x + 16, top), color=BRANCH[LOCAL], dash="5 3")]
    shapes += [box(156, 204, 418, 24, "white", "white"), box(156, 264, 418, 24, "white", "white")]
    shapes += [text(365, 221, "global maps, cropped to each patch (modes 2, 3)", color=BRANCH[GLOBAL])]
    shapes += [text(365, 281, "local maps, merged to the whole image (mode 3)", color=BRANCH[LOCAL])]

    shapes += [arrow((PS3 + 5, 248), (PS3 + 5, 300), color=GREY, dash="2 3")]
    shapes += [arrow((PS3 + 5, 248), (PS3 + 5, 190), color=GREY, dash="2 3")]
    shapes += [text(PS3 - 4, 242, "regulariser", "end", 12, GREY), text(PS3 - 4, 257, "(MSE)", "end", 12, GREY)]
    shapes += [arrow((PS3 + 18, 190), (PS3 + 18, 237), (740, 237)), arrow((PS3 + 18, 300), (PS3 + 18, 253), (740, 253))]
    shapes += [text(PS3 + 26, 229, "cropped", "start", 12)]
    shapes += [box(740, 224, 70, 42, "white", INK), text(775, 250, "3 x 3"), arrow((810, 245), (860, 245))]
    rows = ((GLOBAL, "global", BRANCH[GLOBAL]), (245, "ensemble", INK), (LOCAL, "local", BRANCH[LOCAL]))
    shapes += [text(868, y + 5, f"{name} prediction", "start", color=color) for y, name, color in rows]
    lines = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif">\n{lines}\n</svg>\n'
    )


if __name__ == "__main__":
    OUTPUT.write_text(draw(), encoding="utf-8")
