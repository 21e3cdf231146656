"""Chats and texts become ids and labels: learned is what the assistant says, and nothing else of a chat.

Runs no model.
"""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_clsa.errors import UserError
from megatron_clsa.finetune.examples import IGNORED, Example, Reader, collate

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2, é"},
]


@pytest.fixture
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def read(tmp_path, tokenizer, *records, max_length=200) -> tuple[list[Example], Reader]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    reader = Reader(tokenizer, max_length)
    return reader.read([path]), reader


def learned(tokenizer, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_only_what_the_assistant_says_is_learned(tmp_path, tokenizer):
    (example,), _ = read(tmp_path, tokenizer, {"messages": CHAT})
    assert learned(tokenizer, example) == "1<end>\n2, é<end>\n"
    whole = tokenizer.decode(example.ids)
    assert whole.startswith("system: Be brief.\nuser: One?\nassistant: 1<end>")
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))


def test_a_tokenizers_own_template_is_used(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (example,), _ = read(tmp_path, tokenizer, {"messages": CHAT})
    assert learned(tokenizer, example) == "1[/]2, é[/]"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        UserError, match=r"data.jsonl:1: the chat template .* renders earlier messages otherwise"
    ):
        read(tmp_path, tokenizer, {"messages": CHAT})


def test_a_text_is_learned_whole_in_pieces(tmp_path, tokenizer):
    examples, _ = read(tmp_path, tokenizer, {"text": "0123456789"}, max_length=4)
    assert [tokenizer.decode(example.ids) for example in examples] == ["0123", "4567", "89<end>"]
    assert all(example.labels == example.ids for example in examples)


def test_long_chats_lose_their_end_and_empty_ones_are_left_out(tmp_path, tokenizer):
    silent = {"messages": CHAT[:2]}
    examples, reader = read(tmp_path, tokenizer, {"messages": CHAT}, silent, {"text": ""}, max_length=50)
    assert len(examples) == 1 and len(examples[0].ids) == 50
    assert (reader.cut, reader.empty) == (1, 2)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list"),
        ({"prompt": "x"}, "needs 'messages' (a chat) or 'text'"),
        ({"text": 3}, "needs 'messages' (a chat) or 'text'"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "begins with what it answers"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a 'content'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        (r'{"text": "a\ud800"}', r"character 2 is '\ud800'"),
        (r'{"messages": [{"role": "user", "content": "\udc00"}]}', r"character 1 is '\udc00'"),
    ],
)
def test_a_bad_record_is_refused_by_its_line(tmp_path, tokenizer, record, named):
    with pytest.raises(UserError) as refusal:
        read(tmp_path, tokenizer, {"text": "good"}, "", record)
    assert "data.jsonl:3" in str(refusal.value) and named in str(refusal.value)


def test_a_line_ends_at_a_line_feed_only(tmp_path, tokenizer):
    """JSON may hold the others as they are."""
    record = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    examples, _ = read(tmp_path, tokenizer, record)
    assert tokenizer.decode(examples[0].ids) == "one\u2028two\x85three<end>"


def test_the_signature_that_windows_editors_write_is_no_text(tmp_path, tokenizer):
    examples, _ = read(tmp_path, tokenizer, '\ufeff{"text": "one"}')
    assert tokenizer.decode(examples[0].ids) == "one<end>"


def test_data_without_anything_to_learn_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="nothing to learn"):
        read(tmp_path, tokenizer, {"messages": CHAT[:2]})


def test_a_batch_is_padded_on_the_right():
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
