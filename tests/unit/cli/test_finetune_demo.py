"""What ``llamax finetune-demo`` writes itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamax.cli import finetune_demo
from llamax.runtime.errors import DataError


def test_rows_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        finetune_demo.write_rows(path, 4)
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4
    longer = path.read_text() + '{"instruction": "mine"}\n'
    path.write_text(longer)
    with pytest.raises(DataError, match=r"rows.jsonl exists and is not an earlier output"):
        finetune_demo.main(["--folder", str(tmp_path)])
    assert path.read_text() == longer
