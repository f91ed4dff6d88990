"""Learning curves as a picture, for benchmarks and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from skyrl_train.errors import DataError, MissingPackageError
from skyrl_train.tracking.line import SCORES
from skyrl_train.tracking.report import read_metrics

_EVALS = tuple(f"eval/all/{kind}" for kind in SCORES)


def plot(
    files: Mapping[str, Path | str] | Sequence[Path | str],
    out_png: Path | str,
    *,
    metrics: Sequence[str] = ("reward/mean", "eval"),
    title: str = "",
) -> Path:
    """Draws one panel a metric over the steps, one line a run, and returns the path of the picture.

    Args:
        files: ``metrics.jsonl`` files or run folders; a mapping's keys are the labels, else the folders' names are.
        out_png: the picture; the ending chooses the format.
        metrics: names of metrics; ``eval`` stands for the score over all evaluated sources. Those that no run has are
            left out.

    Raises:
        DataError: no run has any of the metrics.
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot: no global state, no window
    except ImportError as error:
        raise MissingPackageError("matplotlib", "drawing curves", 'pip install "skyrl-train[dev]"') from error
    runs = {label: read_metrics(path) for label, path in _labelled(files).items()}
    panels = {metric: drawn for metric in metrics if (drawn := _curves(runs, metric))}
    if not panels:
        raise DataError(f"none of {', '.join(metrics)} is in {', '.join(runs) or 'no file'}: nothing to draw.")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (metric, drawn) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for label, (steps, values) in drawn.items():
            axes.plot(steps, values, label=label, linewidth=1.4, marker="o" if len(steps) < 30 else "", markersize=3)
        axes.set(xlabel="step", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=120)
    return Path(out_png)


def _labelled(files: Mapping[str, Path | str] | Sequence[Path | str]) -> dict[str, Path]:
    if isinstance(files, Mapping):
        return {label: _metrics_file(path) for label, path in files.items()}
    paths = [_metrics_file(path) for path in files]
    names = [path.parent.name for path in paths]
    return {name if names.count(name) == 1 else str(path.parent): path for name, path in zip(names, paths, strict=True)}


def _metrics_file(path: Path | str) -> Path:
    path = Path(path)
    return path / "metrics.jsonl" if path.is_dir() else path


def _curves(runs: Mapping[str, list[dict[str, float]]], metric: str) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each run that has the metric."""
    names = _EVALS if metric == "eval" else (metric,)
    curves = {}
    for label, rows in runs.items():
        points = [(row["step"], row[n]) for row in rows if (n := next((n for n in names if n in row), ""))]
        if points:
            curves[label] = ([step for step, _ in points], [value for _, value in points])
    return curves
