"""Draw a run's metrics: loss, coverage, distillation, learning rate and throughput over its steps.

    python tools/plot_run.py runs/quick/metrics.jsonl [more.jsonl ...] --out loss.png

Owns reading and drawing; what a figure means is in megatron_clsa/training/metrics.py and distill/probe.py.
Phases are told apart by shade. Several files share the axes, one line style each.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

# Panel title -> (metric, label, as points with a line between) ...; colours are told by place.
PANELS = {
    "loss, nats a token": (("lm_loss", "training"), ("valid_lm_loss", "validation")),
    "share of attention on k tokens": (
        ("attention_coverage", "index"),
        ("oracle_coverage", "best k"),
        ("recent_coverage", "most recent k"),
        ("random_coverage", "random k"),
    ),
    "distillation, nats a token": (("kd_loss", "cross-entropy, training"), ("exact_kl", "KL, validation")),
    "KL to the teacher, nats a token": (("teacher_kl", "training"), ("valid_teacher_kl", "validation")),
    "learning rate": (("learning_rate", ""),),
    "tokens a second": (("tokens_per_second", ""),),
}
EVERY_STEP = {"lm_loss", "kd_loss", "teacher_kl", "learning_rate", "tokens_per_second"}
NOISY = {"lm_loss", "teacher_kl", "tokens_per_second"}  # drawn smoothed, over themselves
STYLES = ("-", "--", ":", "-.")
SHADES = ("#eef2f7", "#ffffff")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics file, or of a run that is still writing it: a cut last line is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a line of metrics")
    if not records:
        raise UserError(f"{path} holds no metrics yet: give the metrics.jsonl of a run that has taken a step")
    return records


def series(records: list[dict], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was measured. A distillation loss of 0 is one that was off."""
    points = [(r["step"], r[metric]) for r in records if isinstance(r.get(metric), int | float)]
    if metric == "kd_loss":
        points = [point for point in points if point[1] != 0]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """A running mean that forgets by `weight` a step, without the bias of its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def phase_spans(records: list[dict]) -> list[tuple[str, int, int]]:
    """(name, first step, last step) of each phase, in the run's order."""
    spans: dict[str, tuple[int, int]] = {}
    for record in records:
        low, high = spans.get(record.get("phase", ""), (record["step"], record["step"]))
        spans[record.get("phase", "")] = min(low, record["step"]), max(high, record["step"])
    return [(name, low, high) for name, (low, high) in spans.items()]


def _draw(axes, title: str, metrics, runs: list[tuple[str, list[dict]]]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    for (name, records), style in zip(runs, STYLES * len(runs), strict=False):
        for place, (metric, label) in enumerate(metrics):
            steps, values = series(records, metric)
            if not steps:
                continue
            label = ", ".join(part for part in (label, name if len(runs) > 1 else "") if part)
            sparse = metric not in EVERY_STEP
            if metric in NOISY:
                axes.plot(steps, values, color=f"C{place}", linewidth=0.5, alpha=0.25)
                values = smooth(values)
            axes.plot(
                steps, values, style, color=f"C{place}", linewidth=1.2, label=label, marker="o" * sparse, ms=3
            )
    for number, (_, low, high) in enumerate(phase_spans(runs[0][1])):
        axes.axvspan(low, high, color=SHADES[number % 2], zorder=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)


def measured_panels(runs: list[tuple[str, list[dict]]]) -> dict:
    """The panels that have a point to show: few runs have a teacher."""
    return {
        title: metrics
        for title, metrics in PANELS.items()
        if any(series(records, metric)[0] for _, records in runs for metric, _ in metrics)
    }


def plot(runs: list[tuple[str, list[dict]]], out: Path) -> None:
    """Draw (name, records) of every run and write the picture; its format is `out`'s ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = measured_panels(runs) or PANELS
    size = {"figsize": (9, 2.2 * len(panels)), "layout": "constrained"}
    figure, grid = pyplot.subplots(len(panels), 1, sharex=True, squeeze=False, **size)
    grid = grid[:, 0]
    for axes, (title, metrics) in zip(grid, panels.items(), strict=True):
        _draw(axes, title, metrics, runs)
    for name, low, high in phase_spans(runs[0][1]):
        grid[0].text(
            (low + high) / 2, 1.0, name, transform=grid[0].get_xaxis_transform(), ha="center", va="top"
        )
    grid[-1].set_xlabel("step")
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)


@one_line_errors
def main(words: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of a run; several are compared")
    parser.add_argument("--out", type=Path, default=Path("run.png"), help="picture to write (run.png)")
    args = parser.parse_args(words)
    plot([(path.parent.name or path.stem, read_metrics(path)) for path in args.metrics], args.out)
    print(f"{args.out}: {len(args.metrics)} run(s)")


if __name__ == "__main__":
    raise SystemExit(main())
