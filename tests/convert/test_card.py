"""The exported folder's README has the sizes and the numbers of the recipe as it was run."""

import json

import pytest
from checkpoints import architecture
from layouts import Layout

from megatron_clsa.convert.card import model_card

PHASE = {
    "folder": "01_dense", "trainable": "backbone", "steps": 600, "tokens": 1228800,
    "cross_attention": "dense", "seq_length": 256, "global_batch_size": 8, "lr": 1e-3,
    "valid_lm_loss": 4.00072, "attention_coverage": 0.61, "oracle_coverage": 0.64,
}  # fmt: skip
OLDER = {"folder": "01_dense", "trainable": "backbone", "steps": 600, "tokens": 1228800}


def _card(folder, record) -> list[str]:
    (folder / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return model_card(architecture(Layout()), folder).splitlines()


def test_the_card_has_the_recipes_numbers(tmp_path):
    line = next(line for line in _card(tmp_path, {"complete": {"dense": PHASE}}) if "| dense |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "dense", "backbone", "dense", "600", "8 x 256", "1,228,800", "0.001", "4.0007",
        "0.610 (best possible 0.640)",
    ]  # fmt: skip


def test_figures_that_an_older_run_did_not_record_stay_empty(tmp_path):
    line = next(line for line in _card(tmp_path, {"complete": {"dense": OLDER}}) if "| dense |" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][3:6] == ["600", "", "1,228,800"]


@pytest.mark.parametrize("record", ["{", "[]", '{"complete": {"dense": 3}}', '{"complete": {}}'])
def test_a_record_that_is_none_leaves_the_table_out(tmp_path, record):
    assert "## Training" not in _card(tmp_path, record)


def test_its_code_asks_no_question_on_a_terminal():
    """Each of them looks into config.json first, whose class is the folder's own."""
    calls = [
        line for line in model_card(architecture(Layout()), None).splitlines() if "from_pretrained(" in line
    ]
    assert len(calls) == 2 and all("trust_remote_code=True" in line for line in calls)


def test_the_front_matter_is_yaml(tmp_path):
    import yaml

    head = yaml.safe_load(model_card(architecture(Layout()), None).split("---")[1])
    assert head["library_name"] == "transformers" and "custom_code" in head["tags"]
