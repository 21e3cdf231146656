"""What a job says and answers when a setting, a path or a flag is wrong: one line and code 2, at once."""

import pytest
from cluster import Job
from jobs import submit

SETTINGS = {
    "misspelt setting": ({"CLSA_PYTHN": "python"}, "sets CLSA_PYTHN, which nothing reads"),
    "folder that cannot be made": ({"CLSA_RUNS": "/proc/none"}, "CLSA_OUT=/proc/none/distill_clsa_7b"),
    "interpreter that is missing": ({"CLSA_PYTHON": "/none/python"}, "CLSA_PYTHON=/none/python"),
    "container that is missing": ({"CLSA_CONTAINER": "/none/x.sqsh"}, "CLSA_CONTAINER=/none/x.sqsh"),
    "container without pyxis": ({"CLSA_CONTAINER": "x"}, "srun knows no containers"),
    "data that is missing": ({"CLSA_DATA": "/none/text"}, "CLSA_DATA: /none/text.idx is missing"),
    "tokenizer that is missing": ({"CLSA_TOKENIZER": "/none/t.model"}, "/none/t.model is missing"),
    "GPUs that are missing": ({"CLSA_GPUS_PER_NODE": "8"}, "GPUs where CLSA_GPUS_PER_NODE is 8"),
    "disk that is too small": ({"CLSA_MIN_FREE_GB": "9999999"}, "CLSA_MIN_FREE_GB is 9999999"),
    "budget that is no number": ({"CLSA_MAX_RESTARTS": "three"}, "CLSA_MAX_RESTARTS=three"),
    "disk that is no number": ({"CLSA_MIN_FREE_GB": "-5"}, "CLSA_MIN_FREE_GB=-5"),
    "switch that is none": ({"CLSA_REQUEUE": "yes"}, "CLSA_REQUEUE=yes"),
}
FILES = {
    "no shell": ("CLSA_RUNS='/unclosed\n", "CLSA_ENV is not valid shell"),
    "space without quotes": (
        "CLSA_RUNS=/my folder/runs\n",
        "line 1: CLSA_RUNS=/my folder/runs: this command fails",
    ),
    "nothing set": ("#CLSA_RUNS=/runs\n", "set CLSA_RUNS"),
}
FLAGS = {"flag that the trainer refuses": ("--index-topk=65", "--index-topk 65")}


@pytest.fixture(scope="module")
def refused(cluster, tmp_path_factory) -> dict[str, tuple[Job, str]]:
    """Jobs with one thing wrong each and the words that must name it; they run side by side."""
    jobs = {}

    def start(name: str, words: str, *flags: str, text: str | None = None, **others: str):
        folder = tmp_path_factory.mktemp("refused")
        if text is not None:
            (folder / "site.env").write_text(text)
        jobs[name] = submit(folder, *flags, flags=("--mem=100",), **others), words

    for name, (wrong, words) in SETTINGS.items():
        start(name, words, **wrong)
    for name, (text, words) in FILES.items():
        start(name, words, text=text)
    for name, (flag, words) in FLAGS.items():
        start(name, words, flag, WANDB_API_KEY="canary-7f3a")
    return jobs


@pytest.mark.parametrize("name", [*SETTINGS, *FILES, *FLAGS])
def test_what_is_wrong_fails_the_job_at_once_in_one_line(refused, name):
    job, words = refused[name]
    job.done()
    errors = [line for line in job.log.splitlines() if "error: " in line]
    assert job.state == "FAILED" and job.field("ExitCode") == "2:0", job.log
    assert len(errors) == 1 and words in errors[0], job.log
    assert job.field("Restarts") == "0"


def test_no_setting_of_the_environment_reaches_a_file(refused):
    """Keys are in the environment of most jobs; launchers like to print it."""
    job = refused["flag that the trainer refuses"][0].done()
    (job.cwd / "site.env").unlink()
    written = [path for path in job.cwd.rglob("*") if path.is_file()]
    assert job.log and not [path for path in written if b"canary-7f3a" in path.read_bytes()]
