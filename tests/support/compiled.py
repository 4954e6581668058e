"""A compile cache as a compiler leaves it."""

from __future__ import annotations

from pathlib import Path

COMPILER = "2.23.6484.0+3b612583"
FOLDER = f"neuronxcc-{COMPILER}"


def compiled(cache: Path, *names: str, neff: bytes = b"neff") -> Path:
    for name in names:
        folder = cache / FOLDER / name
        folder.mkdir(parents=True)
        (folder / "model.neff").write_bytes(neff + name.encode() * 1000)
        (folder / "model.hlo.pb").write_bytes(b"hlo" * 10)
        (folder / "compile_flags.json").write_text("[]")
        (folder / "model.hlo.pb.lock").touch()
    return cache
