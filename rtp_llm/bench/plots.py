"""Plots of a report as PNG and SVG. Needs matplotlib (the extra `bench`)."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from rtp_llm.bench.campaign import Case
from rtp_llm.bench.report import Report, itl_p99

SUFFIXES = (".png", ".svg")
WIDTH = 0.8  # of a bar; the distance of two bars is 1


def draw(report: Report, folder: Path) -> list[Path]:
    """Writes two plots into the folder, each as PNG and SVG, and returns the paths of these files: `rates` shows tokens
    per second with the highest rate that the machine allows, `latencies` the inter-token latency (99th percentile).
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "rates": _bars(report, "tokens per second (line: the bound)", report.rate, report.bound),
        "latencies": _bars(report, "ITL p99, ms", lambda case, target: report.median(case, target, itl_p99)),
    }
    files = []
    for name, figure in figures.items():
        for suffix in SUFFIXES:
            files.append(folder / f"{name}{suffix}")
            figure.savefig(files[-1], dpi=120)
    return files


Height = Callable[[Case, str], float]  # of a target's bar in a case


def _bars(report: Report, label: str, height: Height, line: Height = lambda case, target: 0.0) -> Figure:
    """Returns a figure with one axis per case, which differ in scale, and one bar per target. `line`: 0 for none."""
    figure = Figure(figsize=(2 + 2.5 * len(report.cases), 4))  # not pyplot's, which keeps it and wants a display
    axes = figure.subplots(1, len(report.cases), squeeze=False)
    for axis, case in zip(axes[0], report.cases, strict=True):
        for number, target in enumerate(report.targets):
            value, limit = height(case, target), line(case, target)
            [bar] = bars = axis.bar(number, value, WIDTH, color=f"C{number}", label=target)
            axis.bar_label(bars, [f"{value:.0f}" if value else ""], fontsize=8)
            if limit:
                axis.hlines(limit, bar.get_x(), bar.get_x() + WIDTH, color="black")
        axis.set_title(case.name)
        axis.set_xticks([])
    axes[0][0].set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    env = report.environment
    figure.suptitle(f"{env['machine']['cpu']}, {env['machine']['cores']} cores, {env['date'][:10]}", fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure
