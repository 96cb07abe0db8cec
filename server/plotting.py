"""Figures in one style, written without a screen. The only module that imports matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")


@contextmanager
def figure_file(path: Path, width: float = 8.0, height: float = 4.5) -> Iterator[Figure]:
    """An empty figure, sizes in inches, to draw on; it is written to `path` when the block ends.

    The figure belongs to no window and no global state, so that any thread of a machine without a
    screen can draw. Raises InvalidInput without matplotlib, for a format other than .png, .svg and
    .pdf, and for a file that cannot be written.
    """
    check_plot_file(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "image.cmap": "viridis",
            "legend.frameon": False,
            "savefig.dpi": 150,
        }
    )
    with style:
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path)
        except OSError as error:
            raise InvalidInput(f"cannot write the plot {path}: {error}") from error


def check_plot_file(path: Path) -> None:
    """Refuse early, before long work, what `figure_file` would refuse: no matplotlib, or an unknown format."""
    if path.suffix.lower() not in _FORMATS:
        raise InvalidInput(f"a plot is written as {', '.join(_FORMATS)}; {path} ends with none of these")
    try:
        import matplotlib  # noqa: F401  # only to know whether it is there
    except ModuleNotFoundError as error:
        raise InvalidInput("plots need matplotlib; install it with `pip install 'mhr-server[plot]'`") from error
