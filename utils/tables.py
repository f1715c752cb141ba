"""Tables as text: with columns of fixed width for a terminal, and in Markdown."""

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of as many cells each as lines with columns of fixed width: the first to the left, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def as_markdown(heads: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> str:
    """Return a table, or its head alone."""
    head, *lines = [f"| {' | '.join(cells)} |\n" for cells in (heads, *rows)]
    return "".join([head, f"|{'---|' * len(heads)}\n", *lines])
