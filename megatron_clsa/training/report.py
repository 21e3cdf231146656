"""What a four-phase run has to show, judged from its metrics file: `python -m megatron_clsa.training.report`.

Owns the checks and the table; measures nothing. A phase without an index in it is a dense phase; the first
later phase is the warm-up, the last one the sparse adaptation.
"""

import json
import sys
from pathlib import Path

from megatron_clsa.errors import OneLineParser, UserError, one_line_errors

COVERAGE_OF_ORACLE = 0.9  # share of the best k tokens' mass that the index must keep
COVERAGE_OVER_BASELINE = 1.2  # "well above" a random and a most-recent-k index
LOSS_GAP = 0.02  # sparse against dense loss on the same batches, nats a token
TEACHER_KL = "valid_teacher_kl"  # measured in phases under a dense teacher only
LOGITS_GAP = 1e-4  # exported fp32 logits against Megatron's


def read_evaluations(metrics: Path) -> dict[str, list[dict]]:
    """Evaluation lines of a metrics file by phase, in the order of the run."""
    try:
        text = metrics.read_text()
    except OSError as fault:
        raise UserError(f"--metrics {metrics}: {fault.strerror}; give the run's metrics.jsonl") from None
    phases: dict[str, list[dict]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as fault:
            raise UserError(f"{metrics}, line {number}: not JSON") from fault
        if "valid_lm_loss" in record:
            phases.setdefault(record["phase"], []).append(record)
    return phases


def judge(phases: dict[str, list[dict]], logits_gap: float | None = None) -> dict[str, bool]:
    """Each claim and whether the run shows it. A figure that is missing or not finite fails its claim."""
    dense = {name: lines for name, lines in phases.items() if "valid_lm_loss_sparse" not in lines[-1]}
    indexed = [lines[-1] for name, lines in phases.items() if name not in dense]
    warmed, adapted = (indexed[0], indexed[-1]) if indexed else ({}, {})
    coverage = _figure(warmed, "attention_coverage")
    checks = {f"loss_falls_in_{name}": _falls(lines) for name, lines in dense.items()}
    checks |= {
        "coverage_near_oracle": coverage >= COVERAGE_OF_ORACLE * _figure(warmed, "oracle_coverage"),
        "coverage_above_random": coverage >= COVERAGE_OVER_BASELINE * _figure(warmed, "random_coverage"),
        "coverage_above_recent": coverage >= COVERAGE_OVER_BASELINE * _figure(warmed, "recent_coverage"),
        "sparse_loss_near_dense": abs(_attention_gap(adapted)) <= LOSS_GAP,
    }
    checks |= {
        f"teacher_kl_falls_in_{name}": _falls(lines, TEACHER_KL)
        for name, lines in dense.items()
        if TEACHER_KL in lines[-1]
    }
    return checks | ({} if logits_gap is None else {"logits_equal": logits_gap <= LOGITS_GAP})


def _figure(record: dict, name: str) -> float:
    value = record.get(name)
    return float("nan") if value is None else value  # every comparison with NaN is false


def _attention_gap(record: dict) -> float:
    return _figure(record, "valid_lm_loss_sparse") - _figure(record, "valid_lm_loss_dense")


def _falls(lines: list[dict], name: str = "valid_lm_loss") -> bool:
    return len(lines) > 1 and _figure(lines[-1], name) < _figure(lines[0], name)


COLUMNS = {  # heading -> metric of the last evaluation
    "coverage": "attention_coverage",
    "oracle": "oracle_coverage",
    "random": "random_coverage",
    "recent": "recent_coverage",
    "KL": "exact_kl",
}


def table(phases: dict[str, list[dict]]) -> str:
    """Loss and coverage by phase, one line each, from the phase's first and last evaluation."""
    taught = any(TEACHER_KL in line for lines in phases.values() for line in lines)
    columns = COLUMNS | ({"teacher KL": TEACHER_KL} if taught else {})
    headings = ["first loss", "last loss", *columns, "sparse gap"]
    rows = [f"{'phase':<14}" + "".join(f"{heading:>11}" for heading in headings)]
    for name, lines in phases.items():
        figures = [_figure(line, "valid_lm_loss") for line in (lines[0], lines[-1])]
        figures += [_figure(lines[-1], metric) for metric in columns.values()] + [_attention_gap(lines[-1])]
        # In a dense phase the index is untrained: its coverage says nothing yet.
        hidden = () if "valid_lm_loss_sparse" in lines[-1] else ("coverage", "KL", "sparse gap")
        cells = [
            "-" if heading in hidden else f"{figure:.4f}"
            for heading, figure in zip(headings, figures, strict=True)
        ]
        rows.append(f"{name:<14}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(rows)


def main(words: list[str]) -> int:
    """Print the table, write the report. Returns 1, after one line that names them, if claims fail."""
    parser = OneLineParser(description="Judge a four-phase run by its metrics file.")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the run")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--logits-gap", type=float, help="largest fp32 logit difference of the export")
    options = parser.parse_args(words)
    phases = read_evaluations(options.metrics)
    if not phases:
        raise UserError(f"--metrics {options.metrics}: holds no evaluation; train with --eval-iters above 0")
    checks = judge(phases, options.logits_gap)
    last = {
        name: {f"first_{key}": lines[0][key] for key in ("valid_lm_loss", TEACHER_KL) if key in lines[0]}
        | lines[-1]
        for name, lines in phases.items()
    }
    report = {
        "passed": all(checks.values()),
        "checks": checks,
        "phases": last,
        "logits_gap": options.logits_gap,
    }
    print(table(phases))
    try:
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as fault:
        raise UserError(f"--report {options.report} cannot be written: {fault.strerror}") from None
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        print(f"error: not shown: {', '.join(failed)} (figures in {options.report})", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main)(sys.argv[1:]))
