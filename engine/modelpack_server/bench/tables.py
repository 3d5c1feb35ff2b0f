"""Benchmark results as Markdown tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack.errors import UsageError
from modelpack_server.bench.benchmark import Benchmark, Measured, Run
from modelpack_server.bench.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADER = (
    "Load", "Requests", "Failed", "Output tok/s", "Total tok/s", "Requests/s",
    "TTFT p50 / p90 / p99, ms", "TPOT p50 / p90 / p99, ms", "End to end p50, s",
)  # fmt: skip
_RATIOS = ("Load", "Server", "Output tok/s", "TTFT p50", "TTFT p99", "TPOT p50")
_NOTHING = "–"


def markdown(benchmark: Benchmark) -> str:
    """Return the report as Markdown, ending in a newline."""
    machine = benchmark.machine
    hardware = [machine.processor, f"{machine.cores} cores", f"{machine.memory / 2**30:.0f} GiB"]
    hardware += [part for part in (machine.gpu, machine.system) if part]
    if machine.power:
        hardware.append(f"on {machine.power}")
    lines = [
        "# modelpack bench",
        "",
        f"- Machine: {', '.join(hardware)}; {_versions(machine.versions)}",
        f"- When: {benchmark.when:%Y-%m-%d %H:%M} UTC",
        f"- Command: `{benchmark.command}`",
        f"- Load: {benchmark.plan.description}",
    ]
    for target in benchmark.targets:
        versions = _versions(target.served.versions)
        lines += [
            "",
            f"## {target.name}",
            "",
            f"Model `{target.served.model}`" + (f"; {versions}" if versions else ""),
            "",
            *_table(_HEADER, [_row(run) for run in target.runs]),
        ]
    if len(benchmark.targets) > 1:
        first, *others = benchmark.targets
        rows = [row for other in others for row in _ratios(first, other)]
        lines += ["", f"## Against {first.name}", "", *_table(_RATIOS, rows), ""]
        lines += [f"Each figure is divided by the figure of {first.name} under the same load."]
    if benchmark.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in benchmark.notes)]
    lines += [
        "",
        "TTFT is the time from a request to its first token, TPOT the time per token after that. "
        "The server reports the token counts; this client measures the times.",
    ]
    return "\n".join(lines) + "\n"


def _row(run: Run) -> tuple[str, ...]:
    report = run.report
    end = report.e2el.get("p50")
    return (
        run.step.name,
        str(report.requests),
        str(report.failed),
        f"{report.output_rate:.1f}",
        f"{report.total_rate:.1f}",
        f"{report.request_rate:.2f}",
        _milliseconds(report.ttft),
        _milliseconds(report.tpot),
        _NOTHING if end is None else f"{end:.2f}",
    )


def _milliseconds(found: Mapping[str, float]) -> str:
    if not found:
        return _NOTHING
    return " / ".join(f"{1e3 * found[name]:.1f}" for name in ("p50", "p90", "p99"))


def _ratios(first: Measured, other: Measured) -> list[tuple[str, ...]]:
    rows = []
    for ours, theirs in zip(first.runs, other.runs, strict=True):
        one, two = ours.report, theirs.report
        pairs = (
            (one.output_rate, two.output_rate),
            (one.ttft.get("p50"), two.ttft.get("p50")),
            (one.ttft.get("p99"), two.ttft.get("p99")),
            (one.tpot.get("p50"), two.tpot.get("p50")),
        )
        cells = [f"{b / a:.2f}×" if a and b is not None else _NOTHING for a, b in pairs]
        rows.append((ours.step.name, other.name, *cells))
    return rows


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns are also aligned as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(header), f"| {' | '.join(rule)} |", *map(line, rows)]


_Value = Callable[[Report], float | None]
_SIZE, _DPI = (13.5, 4.2), 120


def require_matplotlib() -> None:
    """Raise `UsageError` unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--png requires matplotlib, which is not installed",
            hint="run pip install 'modelpack[bench]', or leave out --png",
        ) from None


def draw(benchmark: Benchmark, path: Path) -> None:
    """Write the charts as PNG to `path`: one line for each server, dashed for p99."""
    require_matplotlib()
    from matplotlib.figure import Figure  # unlike pyplot, it opens no window and keeps no state

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    throughput, ttft, tpot = figure.subplots(1, 3)
    panels: tuple[tuple[Axes, str, list[tuple[str, str, _Value]]], ...] = (
        (throughput, "Output tokens/s", [("", "-", lambda r: r.output_rate)]),
        (ttft, "TTFT, ms", [(" p50", "-", _chart_milliseconds("ttft", "p50")),
                            (" p99", "--", _chart_milliseconds("ttft", "p99"))]),
        (tpot, "TPOT, ms", [(" p50", "-", _chart_milliseconds("tpot", "p50")),
                            (" p99", "--", _chart_milliseconds("tpot", "p99"))]),
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


def _chart_milliseconds(name: str, percentile: str) -> _Value:
    def value(report: Report) -> float | None:
        seconds = getattr(report, name).get(percentile)
        return None if seconds is None else float(1e3 * seconds)

    return value
