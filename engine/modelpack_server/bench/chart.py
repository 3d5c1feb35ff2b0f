"""A benchmark as a picture: throughput, TTFT and TPOT over the level of the load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.errors import UsageError
from modelpack_server.bench.benchmark import Benchmark
from modelpack_server.bench.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Value = Callable[[Report], float | None]
_SIZE, _DPI = (13.5, 4.2), 120


def require_matplotlib() -> None:
    """Raise `UsageError` unless pictures can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'modelpack[bench]', or leave out --png",
        ) from None


def draw(benchmark: Benchmark, path: Path) -> None:
    """Write the picture as PNG to `path`; a server is a line, its p99 dashed."""
    require_matplotlib()
    from matplotlib.figure import Figure  # no window, and no state that pyplot would keep

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    throughput, ttft, tpot = figure.subplots(1, 3)
    panels: tuple[tuple[Axes, str, list[tuple[str, str, _Value]]], ...] = (
        (throughput, "Output tokens/s", [("", "-", lambda r: r.output_rate)]),
        (ttft, "TTFT, ms", [(" p50", "-", _milliseconds("ttft", "p50")),
                            (" p99", "--", _milliseconds("ttft", "p99"))]),
        (tpot, "TPOT, ms", [(" p50", "-", _milliseconds("tpot", "p50")),
                            (" p99", "--", _milliseconds("tpot", "p99"))]),
    )  # fmt: skip
    steps = benchmark.plan.steps
    named = benchmark.plan.axis == "workload"
    places = list(range(len(steps)))
    labels = [step.name if named else f"{step.level:g}" for step in steps]
    for axes, title, lines in panels:
        for number, target in enumerate(benchmark.targets):
            for suffix, style, value in lines:
                values = [value(run.report) for run in target.runs]
                heights = [float("nan") if found is None else found for found in values]
                axes.plot(places, heights, style, marker="o", color=f"C{number}",
                          label=target.name + suffix)  # fmt: skip
        axes.set_title(title)
        axes.set_xticks(places, labels, rotation=30 if named else 0)
        axes.set_xlabel(benchmark.plan.axis)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{benchmark.machine.processor}: {benchmark.plan.description}", fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": "modelpack"})


def _milliseconds(name: str, percentile: str) -> _Value:
    def value(report: Report) -> float | None:
        seconds = getattr(report, name).get(percentile)
        return None if seconds is None else float(1e3 * seconds)

    return value
