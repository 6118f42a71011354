"""A metric over steps, as SVG."""

import io
import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report.runs import Run

_CURVE_POINTS = 400  # of a curve, at most


def draw_curves(key: str, runs: list[Run]) -> str:
    """An SVG element: `key` over steps, a line a run."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            points = [point for point in run.history.get(key, []) if math.isfinite(point[1])]
            points = points[:: -(-len(points) // _CURVE_POINTS) or 1]
            marker = "." if len(points) < 50 else None
            axes.plot([s for s, _ in points], [v for _, v in points], color=run.colour, marker=marker, linewidth=1.3)
        _style(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "<svg" + buffer.getvalue().partition("<svg")[2]


def _style(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    low, high = axes.dataLim.intervaly
    if 0 < low < high / 30:
        axes.set_yscale("log")
