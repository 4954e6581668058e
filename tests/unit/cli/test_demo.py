"""``llamax demo`` needs two packages that llamax itself does not, and says so before it begins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llamax.cli.demo import main
from llamax.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("package", "extra"), [("tensorboard", "tensorboard"), ("matplotlib", "plot")]
)
def test_a_missing_package_is_named_before_anything_is_made(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        BackendError, match=rf"the package {package}, .*pip install 'llamax\[{extra}\]'"
    ):
        main(["--folder", str(tmp_path / "demo")])
    assert not (tmp_path / "demo").exists()
