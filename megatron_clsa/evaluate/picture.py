"""Draws a report as one PNG: loss by position, needle scores, coverage by layer.

Owns no figure; takes the report's dictionary as it is written to JSON and leaves out what it lacks.
"""

from pathlib import Path


def draw(report: dict, path: Path) -> None:
    """Write the picture; one panel a section that the report has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"perplexity": _loss, "needle": _needle, "index": _index}
    panels = {name: panel for name, panel in panels.items() if name in report}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for (name, panel), axis in zip(panels.items(), axes[0], strict=True):
        panel(axis, report[name])
    figure.suptitle(report["model"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _loss(axis, section: dict):
    buckets = section["by_position"]
    middle = [(b["first"] * b["last"]) ** 0.5 for b in buckets]
    axis.plot(middle, [b["loss"] for b in buckets], marker="o")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens seen", ylabel="loss (nats a token)", title=f"loss, mean {section['loss']:.3f}")


def _needle(axis, rows: list[dict]):
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    score = {(row["task"], row["length"]): row["score"] for row in rows}
    grid = [[score[task, length] for length in lengths] for task in tasks]
    axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            color = "black" if 0.2 < value < 0.8 else "white"  # the ends of the scale are dark
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set(xlabel="prompt (tokens)", title="needle score")


def _index(axis, section: dict):
    layers = section["by_layer"]
    for name in ("oracle_coverage", "coverage", "recent_coverage", "random_coverage", "overlap"):
        axis.plot([row["layer"] for row in layers], [row[name] for row in layers], marker=".", label=name)
    axis.set_xticks([row["layer"] for row in layers])
    axis.set(xlabel="layer, from 0", ylim=(0, 1.02), title=f"index, k = {section['index_topk']}")
    axis.legend(fontsize=7)
