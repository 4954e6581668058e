"""What an image installs: what its base lacks, at pinned versions with hashes."""

from __future__ import annotations

import pytest

from llamax.launch import image_pins

REQUIREMENTS = """# a comment
jinja2==3.1.6 ; python_full_version < '3.15' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
markupsafe==3.0.4 \\
    --hash=sha256:cc
pyyaml==6.0.4 \\
    --hash=sha256:dd
setuptools==84.2.1 \\
    --hash=sha256:ee
"""
PROJECT = """dependencies = [
  "torch>=2.9",
  "jinja2>=3.1.6",
  "PyYAML>=6.0",
]
"""


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        ({}, ["jinja2", "markupsafe", "pyyaml"]),
        ({"jinja2": "3.1.6", "markupsafe": "2.0", "pyyaml": "6.0.1"}, []),
        ({"jinja2": "3.1.5", "markupsafe": "2.0", "pyyaml": "5.4"}, ["jinja2", "pyyaml"]),
        ({"jinja2": "3.1.10", "pyyaml": "6"}, ["markupsafe"]),
        ({"jinja2": "4.0rc1", "markupsafe": "", "pyyaml": "7"}, []),
    ],
)
def test_what_the_base_lacks_or_has_too_old(versions: dict[str, str], names: list[str]) -> None:
    entries = image_pins.needed(REQUIREMENTS, PROJECT, versions)
    assert [entry.partition("==")[0] for entry in entries] == names
    assert all("--hash=sha256:" in entry for entry in entries)


def test_names_choose_entries(capsys: pytest.CaptureFixture[str]) -> None:
    assert image_pins.main(["setuptools"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("setuptools==")
    assert [line for line in text.splitlines() if "==" in line and "--hash" not in line] == [
        text.splitlines()[0]
    ]


def test_the_packages_of_this_environment_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert image_pins.main([]) == 0
    kept = {name for name, _ in image_pins.pins(capsys.readouterr().out)}
    assert not kept & {"jinja2", "pydantic", "sentencepiece", "setuptools"}
