"""Text to indexed data and back; what a kill leaves behind; what bad input says."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_clsa.data import corpus
from megatron_clsa.data import preprocess as preprocessing
from megatron_clsa.data.corpus import write_standard_library
from megatron_clsa.data.indexed import read_manifest, verify_checksums, write_index
from megatron_clsa.data.preprocess import Job, preprocess
from megatron_clsa.data.tokenizer import load_tokenizer_of, train_sentencepiece
from megatron_clsa.data.validation import validate_data
from megatron_clsa.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = [f"def f{i}(x):\n\treturn  x + {i}  # größer ☃\n" for i in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(TEXTS, path, vocab_size=320)
    return str(path)


def _jsonl(path: Path, texts=TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def _job(tmp_path, model, **others) -> Job:
    defaults = dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model, part_bytes=1000)
    return Job(output_prefix=str(tmp_path / "out"), **(defaults | others))


def _texts_of(prefix: str, model: str) -> list[str]:
    tokenizer = load_tokenizer_of("SentencePieceTokenizer", model)
    data = IndexedDataset(prefix)
    documents = [data[i].tolist() for i in range(len(data))]
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in documents)
    return [tokenizer.detokenize(ids[:-1]) for ids in documents]


@pytest.mark.parametrize("workers", [1, 2])
def test_text_survives_the_round_trip(tmp_path, model, workers):
    made = preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "in.jsonl")], workers)
    assert _texts_of(str(tmp_path / "out"), model) == TEXTS
    assert made["documents"] == len(TEXTS)
    validate_data([str(tmp_path / "out")], load_tokenizer_of("SentencePieceTokenizer", model))
    assert verify_checksums(str(tmp_path / "out")) == made
    assert not (tmp_path / "out.parts").exists()


def test_parts_of_any_size_give_the_same_bytes(tmp_path, model):
    source = _jsonl(tmp_path / "in.jsonl")
    found = set()
    for size in (1, 37, 64, 5000, 1 << 20):
        preprocess(_job(tmp_path, model, part_bytes=size), [source], 1, overwrite=True)
        found.add((tmp_path / "out.bin").read_bytes() + (tmp_path / "out.idx").read_bytes())
    assert len(found) == 1


def test_a_folder_of_text_files_is_a_document_each(tmp_path, model):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, text in (("b.txt", "second"), ("a.py", "first\n"), ("deep/c", "third")):
        (tmp_path / "in" / name).write_text(text)
    preprocess(_job(tmp_path, model), [str(tmp_path / "in")], 2)
    assert _texts_of(str(tmp_path / "out"), model) == ["first\n", "second", "third"]


def test_the_signature_that_windows_editors_write_is_no_text(tmp_path, model):
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n", encoding="utf-8-sig")
    preprocess(_job(tmp_path, model), [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], 1)
    assert _texts_of(str(tmp_path / "out"), model) == TEXTS[:2]


def test_the_index_is_byte_for_byte_megatrons(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.uint16)
    lengths = [3, 1, 7]
    for length in lengths:
        builder.add_item(torch.ones(length))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    write_index(tmp_path / "ours.idx", numpy.uint16, numpy.array(lengths))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()


def _command(tmp_path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--output-prefix",
        str(tmp_path / "out"),
        *arguments,
    ]


def test_a_killed_run_leaves_nothing_that_loads_and_goes_on(tmp_path, model):
    source = _jsonl(tmp_path / "in.jsonl", [text * 40 for text in TEXTS])
    driver = (
        "import sys, time; from megatron_clsa.data import preprocess as p; run = p._run_part;"
        "p._run_part = lambda *a: (time.sleep(0.05), run(*a))[1];"
        f"job = p.Job({str(tmp_path / 'out')!r}, 'SentencePieceTokenizer', {model!r}, part_bytes=9000);"
        f"p.preprocess(job, [{source!r}], 1)"
    )
    started = subprocess.Popen([sys.executable, "-c", driver], env={**os.environ, "PYTHONPATH": str(ROOT)})
    parts = tmp_path / "out.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*[0-9].json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*[0-9].json")}
    assert len(done) >= 3
    with pytest.raises(UserError, match="no dataset at"):
        validate_data([str(tmp_path / "out")])
    log = (tmp_path / "log").open("w+")
    preprocess(_job(tmp_path, model, part_bytes=9000), [source], 1, log=log)
    log.seek(0)
    assert log.read().startswith(f"going on: {len(done)} of ")
    assert _texts_of(str(tmp_path / "out"), model) == [text * 40 for text in TEXTS]


def test_ctrl_c_is_one_line_and_the_parts_are_kept(tmp_path, model):
    text = _jsonl(tmp_path / "in.jsonl", TEXTS * 3000)
    words = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", text, "--workers", "2"]
    words += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model", model]
    # A terminal sends the signal to all of its job; a background process would ignore it.
    default = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=default
    )
    parts, deadline = tmp_path / "out.parts", time.monotonic() + 60
    while not list(parts.glob("*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = [line for line in process.communicate()[1].splitlines() if not line.startswith("parts ")]
    assert process.returncode == -signal.SIGINT
    assert len(said) == 1 and said[0].startswith("error: stopped by Ctrl-C"), said
    assert not (tmp_path / "out.idx").exists()


def test_a_second_command_for_the_same_prefix_is_refused(tmp_path, model, monkeypatch):
    """Of other input it would mix its parts with the first's, and nothing would tell."""
    run, source, other = preprocessing._run_part, tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    _jsonl(source)
    _jsonl(other, ["another text"])

    def run_beside_another(number, part):
        with pytest.raises(UserError, match="another command is making it"):
            preprocess(_job(tmp_path, model), [str(other)], 1, overwrite=True)
        return run(number, part)

    monkeypatch.setattr(preprocessing, "_run_part", run_beside_another)
    preprocess(_job(tmp_path, model), [str(source)], 1)
    assert _texts_of(str(tmp_path / "out"), model) == TEXTS


def test_a_killed_worker_is_one_line(tmp_path, model, monkeypatch):
    monkeypatch.setattr(preprocessing, "_run_part", _killed_part)
    with pytest.raises(UserError, match="--workers 2: one was killed"):
        preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "in.jsonl")], 2, log=io.StringIO())


def _killed_part(number, part):
    os.kill(os.getpid(), signal.SIGKILL)


def test_parts_made_otherwise_are_not_reused(tmp_path, model):
    source = tmp_path / "in.jsonl"
    _jsonl(source, ["one", "two"])
    with source.open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError):
        preprocess(_job(tmp_path, model, part_bytes=10), [str(source)], 1)
    _jsonl(source, ["three", "four"])
    preprocess(_job(tmp_path, model, part_bytes=10), [str(source)], 1)
    assert _texts_of(str(tmp_path / "out"), model) == ["three", "four"]


def test_bad_lines_are_counted_and_the_first_is_named(tmp_path, model):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n\nnot json\n{"other": 1}\n[]\n{"text": 3}\n{"text": ""}\n{"text": "b"}')
    made = preprocess(_job(tmp_path, model, skip_bad_lines=True, part_bytes=7), [str(source)], 2)
    assert (made["documents"], made["bad"], made["empty"]) == (2, 4, 1)
    assert made["first_bad"].startswith(f"{source}:3: not JSON")
    assert _texts_of(str(tmp_path / "out"), model) == ["a", "b"]


BAD = {
    "missing": ("nothing.jsonl", None, "--input .*nothing.jsonl does not exist"),
    "empty": ("in.jsonl", "", "in.jsonl is empty"),
    "not json": ("in.jsonl", '{"text": "a"}\n{"text": \n', r"in.jsonl:2: not JSON .* --skip-bad-lines"),
    "no key": ("in.jsonl", '{"content": "a"}\n', r"in.jsonl:1: no key 'text' \(its keys: content\)"),
    "no text": ("in.jsonl", '{"text": ""}\n', "no usable document"),
    "half a character": ("in.jsonl", '{"text": "\\ud800"}\n', "in.jsonl:1: 'text' holds half a character"),
    "half a character in bytes": ("in.jsonl", b'{"text": "a\xed\xa0\x80"}\n', "in.jsonl:1: not JSON"),
    "too deep": ("in.jsonl", "[" * 99999, "in.jsonl:1: not JSON"),
    "not utf-8": ("in.txt", b"\xff", r"in.txt is not UTF-8 text \(byte 0\)"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(tmp_path, model, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        preprocess(_job(tmp_path, model), [str(tmp_path / name)], 1)


@pytest.fixture
def packed(tmp_path) -> str:
    """The texts in two Zstandard frames."""
    zstandard = pytest.importorskip("zstandard")
    raw = Path(_jsonl(tmp_path / "in.jsonl")).read_bytes()
    half = raw.index(b"\n", len(raw) // 2) - 5  # within a line
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(part) for part in (raw[:half], raw[half:])))
    return str(path)


@pytest.fixture
def columns(tmp_path) -> str:
    """The texts as the second column of a Parquet file of many row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "in.parquet"
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=50)
    return str(path)


@pytest.mark.parametrize("kind", ["packed", "columns"])
def test_packed_text_gives_the_bytes_of_plain_text(tmp_path, model, kind, request):
    preprocess(_job(tmp_path, model), [request.getfixturevalue(kind)], 2)
    made = [(tmp_path / f"out{suffix}").read_bytes() for suffix in (".bin", ".idx")]
    preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "plain.jsonl")], 1, overwrite=True)
    assert made == [(tmp_path / f"out{suffix}").read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("keep", [0.3, 0.75, 0.999])
@pytest.mark.parametrize("kind", ["packed", "columns"])
def test_packed_text_that_is_cut_off_is_refused_even_where_bad_lines_are_skipped(
    tmp_path, model, kind, keep, request
):
    path = request.getfixturevalue(kind)
    os.truncate(path, int(Path(path).stat().st_size * keep))
    with pytest.raises(UserError, match=f"--input {path} (is damaged after|cannot be read)"):
        preprocess(_job(tmp_path, model, skip_bad_lines=True), [path], 2)
    assert not (tmp_path / "out.idx").exists()


def test_a_parquet_column_or_row_that_is_missing_is_named(tmp_path, model, columns):
    with pytest.raises(UserError, match=r"has no column 'body' \(it has: id, text\); give --json-keys"):
        preprocess(_job(tmp_path, model, json_key="body"), [columns], 1)
    with pytest.raises(UserError, match=r"in.parquet: row 1 has no text"):
        preprocess(_job(tmp_path, model, json_key="id"), [columns], 1)


def test_a_file_that_is_named_twice_is_warned_of(tmp_path, model):
    source, log = _jsonl(tmp_path / "in.jsonl"), io.StringIO()
    made = preprocess(_job(tmp_path, model), [source, str(tmp_path)], 1, log=log)
    assert made["documents"] == 2 * len(TEXTS) and f"{source} 2 times" in log.getvalue()


def test_a_tokenizer_that_cannot_be_trained_says_why(tmp_path):
    def texts():
        yield "some text"
        raise UserError("in.jsonl:2: not JSON")

    with pytest.raises(UserError, match=r"^in.jsonl:2: not JSON"):
        train_sentencepiece(texts(), tmp_path / "t.model", vocab_size=300)
    with pytest.raises(UserError, match=r"--output /proc/none/t.model cannot be written"):
        train_sentencepiece(TEXTS, Path("/proc/none/t.model"), vocab_size=320)


def test_bad_tokenizers_are_named(tmp_path, model):
    source = _jsonl(tmp_path / "in.jsonl")
    (tmp_path / "junk.model").write_text("junk")
    for kind, path, message in (
        ("SentencePieceTokenizer", "nothing.model", "nothing.model does not exist"),
        ("SentencePieceTokenizer", str(tmp_path / "junk.model"), "junk.model is not a SentencePiece model"),
        ("SentencePieceTokenizer", str(tmp_path), "is a folder, SentencePieceTokenizer needs a file"),
        ("HuggingFaceTokenizer", model, "is not a Hugging Face tokenizer folder"),
        ("WordTokenizer", model, "--tokenizer-type WordTokenizer is not known"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(_job(tmp_path, path, tokenizer_type=kind), [source], 1)


def test_the_command_ends_with_one_line_and_code_2(tmp_path, model):
    (tmp_path / "in.jsonl").write_text("{\n")
    command = _command(tmp_path, "--input", str(tmp_path / "in.jsonl"), "--tokenizer-model", model)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    errors = [line for line in result.stderr.splitlines() if "cpp_extension" not in line]
    assert result.returncode == 2 and result.stdout == ""
    assert len(errors) == 1 and errors[0].startswith(f"error: {tmp_path}/in.jsonl:1: not JSON")


def test_a_full_disk_is_said_so_and_leaves_nothing_that_loads(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numpy, "save", full)
    with pytest.raises(UserError, match=r"the disk is full.*finished parts are kept"):
        preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "in.jsonl")], 1)
    assert not (tmp_path / "out.idx").exists()


def test_an_existing_dataset_is_not_replaced_unasked(tmp_path, model):
    source = _jsonl(tmp_path / "in.jsonl")
    preprocess(_job(tmp_path, model), [source], 1)
    with pytest.raises(UserError, match="--overwrite"):
        preprocess(_job(tmp_path, model), [source], 1)


@pytest.mark.parametrize("prefix", ["", "{}/", "{}/made/"])
def test_a_prefix_without_a_name_is_refused(tmp_path, model, prefix):
    """It would make `.bin` and `.idx`, which no `ls` shows."""
    job = Job(prefix.format(tmp_path), "SentencePieceTokenizer", model)
    with pytest.raises(UserError, match=r"--output-prefix '.*' holds no name"):
        preprocess(job, [_jsonl(tmp_path / "in.jsonl")], 1, log=io.StringIO())
    assert not (tmp_path / "made").exists()


def test_a_flipped_bit_fails_its_checksum(tmp_path, model):
    preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "in.jsonl")], 1)
    raw = bytearray((tmp_path / "out.bin").read_bytes())
    raw[100] ^= 1
    (tmp_path / "out.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"out.bin does not match its checksum"):
        verify_checksums(str(tmp_path / "out"))


def test_data_of_another_tokenizer_is_refused(tmp_path, model):
    preprocess(_job(tmp_path, model), [_jsonl(tmp_path / "in.jsonl")], 1)
    other = tmp_path / "other.model"
    train_sentencepiece(TEXTS, other, vocab_size=325)
    with pytest.raises(UserError, match="made with another tokenizer"):
        validate_data([str(tmp_path / "out")], load_tokenizer_of("SentencePieceTokenizer", other))
    assert read_manifest(tmp_path / "out")["vocab_size"] == 320


def test_the_standard_library_corpus_is_deterministic_and_limited(tmp_path):
    for name in ("a", "b"):
        assert write_standard_library(tmp_path / name, max_bytes=200_000) > 5
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    texts = [json.loads(line)["text"] for line in (tmp_path / "a").open()]
    assert 100_000 < sum(map(len, texts)) <= 200_000


def test_a_corpus_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert corpus.main([str(tmp_path / "file" / "text.jsonl")]) == 2
    assert "text.jsonl cannot be written" in capsys.readouterr().err
