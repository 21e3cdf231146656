"""Which rank says a refusal: `megatron_clsa.errors` without a run around it."""

import io
import os

from megatron_clsa import errors


@errors.one_line_errors
def refuse():
    raise errors.UserError("--seed -1")


def test_rank_0_speaks_at_once_and_the_others_after_it(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    alone = f"rank 1 on {os.uname().nodename}: "
    for rank, waited, named in (("0", [], ""), ("1", [errors.OTHERS_WAIT], alone)):
        monkeypatch.setenv("RANK", rank)
        assert refuse() == 2
        assert capsys.readouterr().err == f"error: {named}--seed -1\n" and waits == waited


def test_a_line_is_one_write_so_that_ranks_do_not_cut_each_others():
    class Writes(io.StringIO):
        def __init__(self):
            super().__init__()
            self.parts = []

        def write(self, text):
            self.parts.append(text)
            return super().write(text)

    stream = Writes()
    errors.say("rank 1 is slow", stream)
    assert stream.parts == ["rank 1 is slow\n"]
