"""Which rank says a refusal: `megatron_clsa.errors` without a run around it."""

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
