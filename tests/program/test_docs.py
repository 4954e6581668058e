"""The documentation is sound: links, commands, options, settings and code exist and run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from llamax.__main__ import COMMANDS
from llamax.config.load import load_config, recipes
from llamax.launch import jobfile
from llamax.launch.checks import problems
from llamax.launch.render import PHASES
from llamax.runtime.units import show_number

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if "generated" not in page.relative_to(DOCS).parts
)
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
OTHERS += sorted((ROOT / "examples").rglob("*.md")) + sorted((ROOT / "findings").glob("*.md"))
EVERY = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES + OTHERS]
GENERATED = ("commands", "settings", "recipes", "machines", "neuron-sdks", "modules/*")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The shell commands of a page, lines that end in a backslash joined."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line.partition(" #")[0].strip() for line in text.splitlines() if line.strip()]


@cache
def help_of(command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert importlib.import_module(COMMANDS[command][0]).main(["--help"]) == 0
    return printed.getvalue()


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if DOCS / "generated" in file.parents:
            assert file.stem in GENERATED, f"{target} is not a page that docs/generate.py makes"
            continue
        assert file.exists(), f"{page}: {target} does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page}: {target} names no heading"


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (DOCS / "index.md").read_text()
    entries = {line for block in re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL)
               for line in block.splitlines() if re.fullmatch(r"[\w/-]+", line)}  # fmt: skip
    here = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"}
    assert here == {entry for entry in entries if not entry.startswith("generated/")}
    assert {e.removeprefix("generated/") for e in entries if e.startswith("generated/")} == {
        name for name in GENERATED if not name.endswith("*")
    }


@pytest.mark.parametrize("page", EVERY)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in commands(page):
        for name, rest in re.findall(r"(?:^|[ ;|&])llamax ([a-z]\w*)(.*)", line):
            assert name in COMMANDS, f"{page}: llamax {name}"
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest.partition(" | ")[0]):
                assert option in help_of(name), f"{page}: llamax {name} has no {option}"


@pytest.mark.parametrize("page", EVERY)
def test_settings_exist(page: Path) -> None:
    text = page.read_text()
    given = re.findall(r"--([a-z0-9_]+\.[a-z0-9_.]+)=", text)
    known = help_of("train")
    sections = re.findall(r"^([a-z]+):$", known, re.MULTILINE)
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z0-9_]+)(?:=[^`]*)?`", text)
    files = {key for key in named if key.endswith((".py", ".safetensors"))}
    for key in {*given, *named} - files - {"section.key"}:
        job = rf"^  {re.escape(key)}\s"
        in_job = re.search(job, help_of("launch"), re.MULTILINE)
        assert f"--{key}=" in known or in_job, f"{page}: there is no setting {key}"


@pytest.mark.parametrize("page", EVERY)
def test_recipes_and_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(page):
        for name in re.findall(r"--config ([\w.-]+)(?:\s|$)", line):
            known = name in recipes() or (page.parent / name).is_file()
            assert known or name in ("RECIPE", "NAME"), f"{page}: no recipe {name}"
        for target in re.findall(r"^make ([\w-]+)", line):
            assert f"\n{target}:" in makefile, f"{page}: make {target}"


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, "python")]
)
def test_python_blocks_compile_and_name_what_exists(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (llamax[\w.]*) import (.*)$", code, re.MULTILINE):
            if module == "llamax.inference.lm_eval":  # needs a package that tests do not have
                continue
            loaded = importlib.import_module(module)
            for name in names.split(", "):
                if not hasattr(loaded, name):
                    importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("page", ["how-to/extend", "how-to/notebooks", "concepts/mesh"])
def test_library_pages_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = DOCS / f"{page}.md"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(path, "python")), {"__name__": "page"})
    printed = capsys.readouterr().out.splitlines()
    assert printed
    if path.stem == "mesh":
        assert printed == re.findall(r"# (\(\(.*)$", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", EVERY)
def test_modules_that_pages_point_to_exist(page: Path) -> None:
    for kind, target in re.findall(r"{py:(\w+)}`([\w.]+)`", page.read_text()):
        module, _, name = (target, "", "") if kind == "mod" else target.rpartition(".")
        loaded = importlib.import_module(module)
        assert not name or hasattr(loaded, name), f"{page}: {target}"


def test_the_job_of_the_launch_page_suits_every_launcher(tmp_path: Path) -> None:
    job_text, shared, rows, secrets = blocks(DOCS / "how-to/launch.md", "toml")
    assert shared.startswith("compile_cache = ")
    job_text = shared + job_text
    text = re.search(r"\[prepare\]\n.*?\n\n", job_text, re.DOTALL)
    assert text
    for section in (text[0], f"{rows}\n"):
        (tmp_path / "job.toml").write_text(job_text.replace(text[0], section))
        job = jobfile.load(tmp_path / "job.toml")
        assert bool(job.prepare.template) == (section != text[0])
        for launcher in PHASES:
            for phase in PHASES[launcher]:
                several = (launcher, phase) == ("torchrun", "cluster")  # the page has 4 nodes
                message = "nodes=4 but --on torchrun makes one instance; use --on slurm or k8s"
                assert problems(job, launcher, phase) == ([message] if several else [])
    head = "[sagemaker]\n"
    others, _, of_sagemaker = secrets.partition(head)
    merged = job_text.replace(head, f"{head}{of_sagemaker}\n")
    (tmp_path / "job.toml").write_text(f"{merged}\n{others}")
    job = jobfile.load(tmp_path / "job.toml")
    for launcher in PHASES:
        assert problems(job, launcher, "train") == []


def test_the_table_of_recipes_is_that_of_the_recipes() -> None:
    text = (DOCS / "reference/recipes.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| ([\d.]+ [MB]) \| tensor (\d+) x", text, re.MULTILINE)
    listed = {
        name: (size, int(tensor))
        for names, size, tensor in rows
        for name in re.findall(r"`(.*?)`", names)
    }
    assert sorted(listed) == recipes()
    for name, (size, tensor) in listed.items():
        config = load_config(name)
        assert config.parallel.tensor == tensor
        exact = show_number(config.model.num_parameters())
        assert float(size.split()[0]) == pytest.approx(float(exact[:-1]), rel=0.02)
        assert size[-1] == exact[-1]


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    text = (DOCS / "how-to/install.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_exit_codes_are_those_of_the_errors() -> None:
    from llamax.runtime import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LlamaxError)
    }
    text = (DOCS / "reference/exit-codes.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert codes <= listed
    in_docstring = re.findall(r"^    (\d+) ", errors.__doc__ or "", re.MULTILINE)
    assert {int(code) for code in in_docstring} | {1} == listed


def test_pictures_are_those_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "drawings" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.main([])
    made = sorted(tmp_path.glob("*.svg"))
    assert len(made) >= 5
    for path in made:
        committed = (DOCS / "drawings" / path.name).read_text()
        assert path.read_text() == committed, (
            f"draw {path.name} again: python docs/drawings/draw.py"
        )
