"""Text files to PREFIX.bin and PREFIX.idx: parallel, resumable, whole or absent.

Owns the parts and their joining. Each part leaves tokens, lengths and, last, a report in PREFIX.parts/;
a run that was stopped goes on from the reports. PREFIX.idx is renamed into place last, and nothing loads
a pair without it. Reading the inputs is readers.py's, the format's checks are indexed.py's.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType

from megatron_clsa.data.indexed import file_of, manifest_path, sha256_of, write_index
from megatron_clsa.data.readers import BadDocument, Part, documents, list_inputs, plan_parts
from megatron_clsa.data.tokenizer import load_tokenizer_of, tokenizer_digest
from megatron_clsa.errors import UserError

_STATE: dict = {}  # of this process: the tokenizer and the job, inherited by forked workers


@dataclass(frozen=True)
class Job:
    """What decides the bytes of the result."""

    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_key: str = "text"
    append_eod: bool = True
    skip_bad_lines: bool = False
    part_bytes: int = 32 << 20

    @property
    def folder(self) -> Path:
        return file_of(self.output_prefix, ".parts")


def preprocess(job: Job, inputs: list[str], workers: int, overwrite: bool = False, log=sys.stderr) -> dict:
    """Make the dataset and return its manifest."""
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if not Path(job.output_prefix).name or job.output_prefix.endswith("/"):
        raise UserError(
            f"--output-prefix '{job.output_prefix}' holds no name: add one, such as {job.output_prefix}text"
        )
    files = list_inputs(inputs)
    for path, times in Counter(path.resolve() for path in files).items():
        if times > 1:
            print(f"WARNING: --input names {path} {times} times, its documents come as often", file=log)
    if file_of(job.output_prefix, ".idx").exists() and not overwrite:
        raise UserError(f"--output-prefix {job.output_prefix} holds a dataset already; give --overwrite")
    tokenizer = load_tokenizer_of(job.tokenizer_type, job.tokenizer_model)
    parts = plan_parts(files, job.part_bytes)
    with _disk_errors(job), _one_maker(job):
        _STATE.update(job=job, tokenizer=tokenizer, dtype=DType.optimal_dtype(tokenizer.vocab_size))
        _open_folder(job, files)
        reports = _run_parts(job, parts, workers, log)
        return _join(job, tokenizer, reports)


class _disk_errors:
    """A full disk or a folder that cannot be written, in one line that says what stays."""

    def __init__(self, job: Job):
        self.job = job

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--output-prefix {self.job.output_prefix}: the disk is full; free some space and run again, "
                "finished parts are kept"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"--output-prefix {self.job.output_prefix} cannot be written: {error}") from None


@contextlib.contextmanager
def _one_maker(job: Job) -> Iterator[None]:
    """Hold the folder of parts, which two commands would fill with parts of both.

    The lock is on the folder itself and goes with its holder; a file system without locks does without.
    """
    held, same = -1, False
    while not same:  # the holder before removes the folder when it is done
        job.folder.mkdir(parents=True, exist_ok=True)
        held = os.open(job.folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output-prefix {job.output_prefix}: another command is making it; wait, or give another"
            ) from None
        except OSError:
            break
        same = job.folder.is_dir() and os.path.samestat(os.fstat(held), job.folder.stat())
    try:
        yield
    finally:
        os.close(held)


def _open_folder(job: Job, files: list[Path]) -> None:
    """Keep the parts of a stopped run only if they were made from the same inputs in the same way."""
    sizes = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    plan = json.dumps([asdict(job), tokenizer_digest(job.tokenizer_model), sizes])
    stored = job.folder / "plan.json"
    if not stored.is_file() or stored.read_text() != plan:
        for part in job.folder.iterdir():
            part.unlink()
        _write_whole(stored, plan)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _run_parts(job: Job, parts: list[Part], workers: int, log) -> list[dict]:
    """Reports of all parts in order; runs those that have none yet."""
    todo = [i for i in range(len(parts)) if not (job.folder / f"{i:06}.json").is_file()]
    if len(todo) < len(parts):
        print(f"going on: {len(parts) - len(todo)} of {len(parts)} parts are done", file=log, flush=True)
    if workers <= 1:
        said = _Progress(len(todo), log)
        for i in todo:
            said(_run_part(i, parts[i]))
    elif todo:
        _run_pool(parts, todo, workers, log)
    return [json.loads((job.folder / f"{i:06}.json").read_text()) for i in range(len(parts))]


class _Progress:
    """Says how many parts are done, how fast, and how long the others will take."""

    def __init__(self, parts: int, log):
        self.parts, self.log = parts, log
        self.started, self.done, self.tokens = time.monotonic(), 0, 0

    def __call__(self, report: dict) -> None:
        self.done, self.tokens = self.done + 1, self.tokens + report["tokens"]
        spent = time.monotonic() - self.started
        print(
            f"parts {self.done}/{self.parts} tokens {self.tokens:,} ({self.tokens / spent:,.0f}/s) "
            f"left {spent / self.done * (self.parts - self.done):.0f} s",
            file=self.log,
            flush=True,
        )


def _run_pool(parts: list[Part], todo: list[int], workers: int, log) -> None:
    context = multiprocessing.get_context("fork")  # shares the loaded tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_end_at_once)
    said = _Progress(len(todo), log)
    try:
        pending = {pool.submit(_run_part, i, parts[i]) for i in todo}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                said(future.result())
    except BrokenProcessPool:
        raise UserError(
            f"--workers {workers}: one was killed (out of memory?); run again to go on, with fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_at_once() -> None:
    """A killed parent must not leave workers writing (PR_SET_PDEATHSIG is option 1 of prctl), nor Ctrl-C wait
    for their parts, each with a traceback. A part that is half made does not count."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run_part(number: int, part: Part) -> dict:
    """Tokenize one part; its report is written last and marks it as done."""
    job, dtype = _STATE["job"], _STATE["dtype"]
    report = {"documents": 0, "tokens": 0, "bad": 0, "empty": 0, "first_bad": None}
    lengths: list[int] = []
    tokens, counts = (job.folder / f"{number:06}{suffix}" for suffix in (".bin", ".npy"))
    drafts = [path.with_name(f"{os.getpid()}.{path.name}") for path in (tokens, counts)]
    with drafts[0].open("wb") as out:
        for ids in _token_ids(part, report):
            out.write(numpy.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    numpy.save(drafts[1], numpy.array(lengths, dtype=numpy.int32))
    for draft, path in zip(drafts, (tokens, counts), strict=True):
        os.replace(draft, path)
    report |= {"documents": len(lengths), "tokens": sum(lengths)}
    _write_whole(job.folder / f"{number:06}.json", json.dumps(report))
    return report


def _token_ids(part: Part, report: dict) -> Iterator[list[int]]:
    """Ids of every usable document, with an end-of-document token unless the tokenizer adds its own."""
    job, tokenizer = _STATE["job"], _STATE["tokenizer"]
    for text in documents(part, job.json_key):
        if isinstance(text, BadDocument):
            if not job.skip_bad_lines:
                raise text
            report["bad"] += 1
            report["first_bad"] = report["first_bad"] or str(text)
            continue
        ids = tokenizer.tokenize(text) if text else []
        if not ids:
            report["empty"] += 1
            continue
        if job.append_eod and ids[-1] != tokenizer.eod:
            ids.append(tokenizer.eod)
        yield ids


def _join(job: Job, tokenizer, reports: list[dict]) -> dict:
    """Concatenate the parts; the old pair, if any, stops loading before the new one starts to exist."""
    total = {key: sum(report[key] for report in reports) for key in ("documents", "tokens", "bad", "empty")}
    if not total["documents"]:
        raise UserError(f"--input holds no usable document ({total['bad']} bad, {total['empty']} empty)")
    names = {suffix: file_of(job.output_prefix, suffix) for suffix in (".bin", ".idx")}
    temporary = {suffix: file_of(job.output_prefix, suffix + ".tmp") for suffix in names}
    digest = hashlib.sha256()
    with temporary[".bin"].open("wb") as out:
        for number in range(len(reports)):
            with (job.folder / f"{number:06}.bin").open("rb") as source:
                while block := source.read(1 << 22):
                    digest.update(block)
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())
    lengths = numpy.concatenate([numpy.load(job.folder / f"{n:06}.npy") for n in range(len(reports))])
    write_index(temporary[".idx"], _STATE["dtype"], lengths)
    manifest = total | {
        "first_bad": next((r["first_bad"] for r in reports if r["first_bad"]), None),
        "vocab_size": tokenizer.vocab_size,
        "append_eod": job.append_eod,
        "tokenizer": {
            "type": job.tokenizer_type,
            "model": job.tokenizer_model,
            "sha256": tokenizer_digest(job.tokenizer_model),
        },
        "sha256": {".bin": digest.hexdigest(), ".idx": sha256_of(temporary[".idx"])},
    }
    names[".idx"].unlink(missing_ok=True)
    os.replace(temporary[".bin"], names[".bin"])
    _write_whole(manifest_path(job.output_prefix), json.dumps(manifest, indent=1))
    os.replace(temporary[".idx"], names[".idx"])
    shutil.rmtree(job.folder, ignore_errors=True)
    return manifest
