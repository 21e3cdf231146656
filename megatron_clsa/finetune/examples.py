"""JSONL of chats or texts to token ids and labels, and the batches made of them.

Owns the record format and which tokens are learned: every token of a text, of a chat only what the assistant
says and the end of its turn. Knows no model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_clsa.errors import UserError, check_text

IGNORED = -100  # the label that transformers' losses leave out
ROLES = ("system", "user", "assistant", "tool")

# For tokenizers without one. What the assistant says ends with the end token, so that generation stops.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one training sequence, equally long."""

    ids: list[int]
    labels: list[int]


@dataclass
class Reader:
    """Turns records into examples of at most `max_length` tokens.

    Attributes:
        cut: chats that were too long and lost their end.
        empty: records of which no learned token was left.
    """

    tokenizer: object
    max_length: int
    cut: int = 0
    empty: int = 0

    def __post_init__(self):
        if not self.tokenizer.is_fast:
            raise UserError("--model: its tokenizer gives no character offsets; save a fast tokenizer there")
        if self.tokenizer.eos_token is None:
            raise UserError("--model: its tokenizer has no eos_token; set one, generation could not stop")
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = CHAT_TEMPLATE

    def read(self, files: list[Path]) -> list[Example]:
        """All examples of the files, in order.

        Raises:
            UserError: naming --data, the file and the line.
        """
        examples = []
        for path in files:
            for where, record in _records(path):
                examples += self._examples(record, where)
        if not examples:
            raise UserError(f"--data {files[0]}: holds nothing to learn from")
        return examples

    def _examples(self, record: dict, where: str) -> list[Example]:
        made = self._chat(record["messages"], where) if "messages" in record else self._text(record, where)
        kept = [example for example in made if any(label != IGNORED for label in example.labels[1:])]
        self.empty += not kept
        return kept

    def _text(self, record: dict, where: str) -> list[Example]:
        """A text in pieces of `max_length`, the last one ending with the end token."""
        if not isinstance(record.get("text"), str):
            raise UserError(f"{where}: needs 'messages' (a chat) or 'text' (a string)")
        ids = [*self.tokenizer.encode(record["text"]), self.tokenizer.eos_token_id]
        pieces = [ids[at : at + self.max_length] for at in range(0, len(ids), self.max_length)]
        return [Example(piece, piece) for piece in pieces]

    def _chat(self, messages: list, where: str) -> list[Example]:
        _check_chat(messages, where)
        text = self._render(messages, where)
        spans = [
            self._span(messages, i, text, where)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [_overlaps(piece, spans) for piece in encoded["offset_mapping"]]
        ids = encoded["input_ids"]
        labels = [token if use else IGNORED for token, use in zip(ids, learned, strict=True)]
        self.cut += len(ids) > self.max_length
        return [Example(ids[: self.max_length], labels[: self.max_length])]

    def _span(self, messages: list, i: int, text: str, where: str) -> tuple[int, int]:
        """The characters of the rendered chat that the assistant produces in message i."""
        before = self._render(messages[:i], where, add_generation_prompt=True)
        after = self._render(messages[: i + 1], where)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"{where}: the chat template of --model renders earlier messages otherwise once message "
                f"{i + 1} is there, so what to learn is unclear: split the chat there, or change the template"
            )
        return len(before), len(after)

    def _render(self, messages: list, where: str, **options) -> str:
        if not messages and not options:
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes
            raise UserError(f"{where}: the chat template of --model refuses this chat: {error}") from error


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """(place for messages, record) of every line that is not blank."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not at U+2028, which JSON may hold
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--data {path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object")
        for text in _strings(record):
            check_text(text, where)
        yield where, record


def _strings(value) -> Iterator[str]:
    """All that a chat template may render."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


def _check_chat(messages, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {number} needs a 'content' that is a string")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} has role {message.get('role')!r}, not one of {ROLES}")
    if messages[0]["role"] == "assistant":
        raise UserError(f"{where}: message 1 is the assistant's: a chat begins with what it answers")


def _overlaps(piece: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    start, end = piece
    return any(start < last and end > first for first, last in spans)


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """A right-padded batch `[b, s]`: input_ids, labels, attention_mask."""
    length = max(len(example.ids) for example in examples)

    def rows(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    ids = [example.ids for example in examples]
    return {
        "input_ids": rows(ids, pad),
        "labels": rows([example.labels for example in examples], IGNORED),
        "attention_mask": rows([[1] * len(row) for row in ids], 0),
    }
