"""The exported folder's README: what the model is, how it was trained, how to load it.

Owns the text; figures come from the run's own record.
"""

import json
from pathlib import Path

from megatron_clsa.convert.architecture import Architecture

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [clsa]
---

# CLSA model

Cross-layer sparse attention: {self_layers} window layers (each token sees {window}), one memory of keys and
values, and {cross_layers} layers that read it at the {topk} positions that one index selects for a token.
Hidden size {hidden}, {heads} query heads and {groups} key/value heads of {width}, vocabulary {vocab}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
{training}"""


def model_card(arch: Architecture, run: Path | None) -> str:
    """Markdown with the model's sizes and, if `run` holds a training record, a table of its phases."""
    return _CARD.format(
        self_layers=arch.num_self_decoder_layers,
        cross_layers=arch.num_layers - arch.num_self_decoder_layers,
        window=arch.sliding_window,
        topk=arch.index_topk,
        hidden=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        width=arch.kv_channels,
        vocab=arch.vocab_size,
        training=_phases(run),
    )


def _phases(run: Path | None) -> str:
    record = run / "run.json" if run else None
    if record is None or not record.is_file():
        return ""
    lines = ["", "## Training", "", "| phase | steps | tokens | coverage of the attention by the index |"]
    lines.append("| --- | --- | --- | --- |")
    for name, done in json.loads(record.read_text())["complete"].items():
        covered, best = done.get("attention_coverage"), done.get("oracle_coverage")
        coverage = f"{covered:.3f} (best possible {best:.3f})" if covered and best else ""
        lines.append(f"| {name} | {done['steps']:,} | {done['tokens']:,} | {coverage} |")
    return "\n".join(lines) + "\n"
