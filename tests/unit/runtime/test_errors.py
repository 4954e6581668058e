"""Exit codes: one meaning each, listed in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from llamax.cli.doctor import NOT_READY
from llamax.cli.plan import DOES_NOT_FIT
from llamax.runtime import errors
from llamax.tools.audit.auditor import DIFFERS


def test_every_exit_code_means_one_thing_and_is_listed() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/reference/exit-codes.md").read_text()
    lists = {
        "errors": re.findall(r"^    (\d+) ", errors.__doc__ or "", re.M),
        "documentation": re.findall(r"^\| (\d+) \|", page, re.M),
    }
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    own = {each.exit_code for each in kinds if hasattr(each, "exit_code")}
    others = {DOES_NOT_FIT, DIFFERS, NOT_READY}
    assert len(others) == 3
    assert not own & others
    for name, listed in lists.items():
        assert len(set(listed)) == len(listed), name
        assert own | others <= set(map(int, listed)), name
