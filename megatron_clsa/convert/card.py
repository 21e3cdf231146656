"""The exported folder's README: what the model is, how it was trained, how to load it.

Owns the text; figures come from the run's own record.
"""

import json
from pathlib import Path

from megatron_clsa.convert.architecture import Architecture

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [clsa, custom_code]
---

# CLSA model

Cross-layer sparse attention: {self_layers} window layers (each token sees {window}), one memory of keys and
values, and {cross_layers} layers that read it at the {topk} positions that one index selects for a token.
{dense}Hidden size {hidden}, MLP {ffn}, {heads} query heads and {groups} key/value heads of {width}, index
head of {index}, vocabulary {vocab}, {tied} embeddings, at most {positions} positions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
```
{training}"""

_DENSE = """These weights are of a phase in which those layers read the whole memory, and so does this folder:
`cross_attention` is "dense" in its `config.json`. Its index may be untrained.
"""


def model_card(arch: Architecture, run: Path | None) -> str:
    """Markdown with the model's sizes and, if `run` holds a training record, a table of its phases."""
    return _CARD.format(
        self_layers=arch.num_self_decoder_layers,
        cross_layers=arch.num_layers - arch.num_self_decoder_layers,
        window=arch.sliding_window,
        topk=arch.index_topk,
        dense=_DENSE if arch.cross_attention == "dense" else "",
        hidden=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        width=arch.kv_channels,
        ffn=arch.ffn_hidden_size,
        index=arch.index_head_dim,
        tied="tied" if arch.tie_embeddings else "untied",
        positions=arch.max_position_embeddings,
        vocab=arch.vocab_size,
        training=_phases(run),
    )


def _phases(run: Path | None) -> str:
    """The recipe's phases as they were run, from `run.json`; nothing where there is none that can be read."""
    try:
        complete = json.loads((run / "run.json").read_text())["complete"] if run else {}
        rows = [_row(name, done) for name, done in complete.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if not rows:
        return ""
    return "\n".join(["", "## Training", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *rows]) + "\n"


_COLUMNS = (
    "phase", "trained", "cross-attention", "steps", "sequences x tokens a step", "tokens",
    "peak learning rate", "validation loss", "coverage of the attention by the index",
)  # fmt: skip


def _row(name: str, done: dict) -> str:
    """Figures that the record does not have stay empty."""
    covered, best = done.get("attention_coverage"), done.get("oracle_coverage")
    loss, rate, sequences = done.get("valid_lm_loss"), done.get("lr"), done.get("global_batch_size")
    return _line(
        [
            name,
            done.get("trainable", ""),
            done.get("cross_attention", ""),
            f"{done['steps']:,}",
            f"{sequences:,} x {done['seq_length']:,}" if sequences else "",
            f"{done['tokens']:,}",
            f"{rate:g}" if rate else "",
            f"{loss:.4f}" if loss else "",
            f"{covered:.3f} (best possible {best:.3f})" if covered and best else "",
        ]
    )


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
