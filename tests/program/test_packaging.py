"""The wheel and the source archive hold all of llamax, and work outside the clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from llamax.launch import image_pins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("llamax", "kernels", "launch", "pyproject.toml", "README.md", "LICENSE")
SETUPTOOLS = 80  # as in pyproject.toml

JOB = """name = "llama2-7b"
recipe = "llama2-7b"
nodes = 4
image = "registry.example/llamax:1"
storage = { mount = "/fsx", claim = "fsx" }
slurm.time_limit = "2-00:00:00"
"""


def python(code: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build(kind: str, sources: Path, out: Path) -> Path:
    """A wheel or sdist made by setuptools itself: no network and no other tool."""
    out.mkdir(exist_ok=True)
    python(f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})", sources)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and a source archive, of a copy so that no earlier build takes part."""
    if int(metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS:
        pytest.skip(f"setuptools is below {SETUPTOOLS}; run make to install the pinned one")
    folder = tmp_path_factory.mktemp("packaging")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources)
    return build("wheel", sources, folder / "wheel"), build("sdist", sources, folder / "sdist")


def files(folder: Path) -> set[str]:
    """The files of llamax that a program needs, linked folders too, as paths in a wheel."""
    found = set()
    for room in ("llamax", "kernels", "launch"):
        inside = "" if room == "llamax" else "llamax/"
        for suffix in ("*.py", "*.toml", "*.css"):
            paths = (folder / room).rglob(suffix)
            found |= {inside + path.relative_to(folder).as_posix() for path in paths}
    return found


def test_wheel_and_sdist_hold_every_file(archives: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = archives
    expected = files(ROOT)
    assert len(expected) > 150
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= in_wheel, sorted(expected - in_wheel)
    assert "llamax/py.typed" in in_wheel
    others = {name for name in in_wheel if not name.startswith(("llamax/", "llamax-"))}
    assert not others, "the bare names kernels and launch belong to other packages"
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    in_sdist = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert expected <= in_sdist, sorted(expected - in_sdist)
    again = build("wheel", unpacked, tmp_path / "again")
    assert set(zipfile.ZipFile(again).namelist()) == in_wheel


def test_an_installed_wheel_works_outside_the_clone(
    archives: tuple[Path, Path], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = Path(
        subprocess.run(
            [venv / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            text=True,
            capture_output=True,
            check=True,
        ).stdout.strip()
    )
    # The dependencies of these tests serve; an editable llamax beside them is not followed.
    dependencies = [folder for folder in sys.path if folder.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    install = ["-m", "pip", "--python", str(venv / "bin/python"), "install", "--quiet", "--no-deps"]
    install += ["--no-index", "--force-reinstall", str(archives[0])]
    subprocess.run([sys.executable, *install], check=True)
    (tmp_path / "job.toml").write_text(JOB)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(venv / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environ,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    modules = "llamax, llamax.kernels, llamax.kernels.attention.op, llamax.launch.render"
    where = run("python", "-c", f"import {modules}; print(llamax.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "consolidate" in run("llamax", "--help")
    assert "trn1.32xlarge" in run(
        *("llamax", "plan", "--config", "llama2-7b", "--nodes", "4"),
        *("--instance", "trn1.32xlarge", "--data.global_batch=256"),
    )
    for launcher in ("k8s", "slurm"):
        rendered = run("llamax", "launch", "--job", "job.toml", "--on", launcher, "--render")
        assert "llama2-7b" in rendered
    run("python", "-c", "import llamax.config.load as load; assert 'demo' in load.recipes()")


# ---- the lock file of uv


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_file_has_the_pinned_versions_from_one_index() -> None:
    text = (ROOT / "uv.lock").read_text()
    packages = tomllib.loads(text)["package"]
    locked: dict[str, set[str]] = {}
    for package in packages:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    pins = re.findall(
        r"^([\w.-]+)==([^;\s]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    assert len(pins) > 20
    for name, version in pins:
        assert version in locked.get(normal(name), ()), f"{name}=={version}: run make lock"
    indexes = {package["source"].get("registry") for package in packages} - {None}
    assert len(indexes) == 1, "one index, the default one"
    assert len(set(re.findall(r'url = "(https://[^/]+)/', text))) == 1, (
        "which keeps its files apart"
    )
    assert not re.search(r"(file|http)://", text)


def test_the_lock_file_is_that_of_the_requirements_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (own,) = (package for package in packages if package["name"] == "llamax")
    required = {("", line) for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        required |= {(extra, line) for line in lines}
    wanted = {
        (extra, normal(found[1]), found[2])
        for extra, line in required
        if (found := re.match(r"([\w.-]+)([^;\s]*)", line))
    }
    locked = set()
    for entry in own["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '([\w-]+)'", entry.get("marker", ""))
        locked.add((extra[1] if extra else "", entry["name"], entry.get("specifier", "")))
    assert wanted == locked, "run make lock"


def test_the_image_installs_what_the_lock_file_has_with_its_hashes() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked: dict[tuple[str, str], set[str]] = {}
    for package in packages:
        files = [*package.get("wheels", []), package.get("sdist", {})]
        hashes = {file["hash"] for file in files if file}
        locked[package["name"], package.get("version", "")] = hashes
    entries = list(image_pins.pins((ROOT / "requirements-image.txt").read_text()))
    for name, entry in entries:
        version = re.match(r"[\w.-]+==([^\s;]+)", entry)
        assert version
        hashes = set(re.findall(r"--hash=(sha256:[0-9a-f]{64})", entry))
        assert hashes, f"{name} has no hash: run make lock"
        assert hashes <= locked[name, version[1]], f"{name}: run make lock"
    names = {name for name, _ in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {normal(re.split("[>;]", line)[0]) for line in project["dependencies"]}
    assert direct - {"torch", "numpy"} <= names, "the base image has torch and numpy"
    assert not {"torch", "numpy"} & names
    assert {"pyarrow", "tensorboard", "setuptools"} <= names
    (extras, _) = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["image"]
    assert f" extras={extras[7:-1]} " in (ROOT / "launch/image.py").read_text()
