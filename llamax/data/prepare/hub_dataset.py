"""Datasets on the Hugging Face Hub: which files are which split, as ``datasets`` chooses them.

::

    README.md                                    configs: of its head name the files of splits
    data/train-00000-of-00002.parquet            or the name does
    validation/rows.jsonl   rows_test.csv        or a word in the name of the folder or the file
    rows.jsonl                                   or all files are the split train

Files are downloaded as they are and read as local ones are; no script of a repository is run.

Source: ``datasets`` 4.8, ``data_files.py`` and the manual configuration of its documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llamax.data.prepare.file_kinds import is_packed, kind_of
from llamax.data.prepare.saved_dataset import PURPOSES
from llamax.runtime.errors import DataError
from llamax.runtime.hub import Wanted, download, file_names, resolve
from llamax.runtime.hub_files import TOKENIZER
from llamax.runtime.hub_name import HubName, hub_name
from llamax.runtime.json_reader import JsonError, read_object
from llamax.runtime.logging import logger

FROM_HUB = "from_hub"  # in dataset.json: the names on the Hub that it was made from
CARD = "README.md"
CARD_BYTES = 2**20  # read of a card
SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IGNORED = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
CONVERTED = "@refs/convert/parquet"  # the branch on which the Hub keeps datasets as Parquet


def dataset_on_hub(name: HubName, split: str = "", text: bool = False) -> dict[str, list[Path]]:
    """Download a dataset: the files of the split of that name, or of train, validation and test.

    ``text``: text files count too.  Raises HubError if it cannot be fetched, and DataError if it
    has no files of rows, no such split, or several configurations.
    """
    name = resolve(name)
    files = sorted(path for path in file_names(name) if _is_data(path, text))
    inside = [p for p in files if p == name.path or p.startswith(f"{name.path.rstrip('/')}/")]
    if name.path and not inside:
        raise DataError(f"{name}: no files of rows lie there; {_has(files, name)}")
    if name.path:
        start = len(name.path.rstrip("/")) + 1
        found = {path[start:] or path: path for path in inside}
        chosen = {
            purpose: [found[short] for short in shorts]
            for purpose, shorts in splits_by_name([*found]).items()
        }
    else:
        chosen = _from_card(name, files) or splits_by_name(files)
    if not files:
        raise DataError(f"{name} holds no files of rows that llamax reads; {_has(files, name)}")
    wanted = (split,) if split else ("train", *(s for s in chosen if s in PURPOSES))
    if wanted[0] not in chosen:
        raise DataError(
            f"{name}: has no split {wanted[0]!r} (splits: {', '.join(chosen)}); choose with `split`"
        )
    taken = {purpose: chosen[purpose] for purpose in dict.fromkeys(wanted)}
    every = [path for paths in taken.values() for path in paths]
    folder = download(name, Wanted("files of rows", lambda names: every))
    return {purpose: [folder / path for path in paths] for purpose, paths in taken.items()}


def pin_inputs(
    out: Path, sources: Sequence[str | Path], tokenizer: str | Path | None
) -> tuple[list[str | Path], str | Path | None, list[str]]:
    """The inputs with the commits of those on the Hub, the tokenizer's folder, and these names.

    A dataset in ``out`` that was made from a name keeps its commit, unless a revision is given.
    """
    kept = made_from(out)

    def pinned(name: HubName) -> HubName:
        commits = [commit for text in kept for commit in re.findall(r"@([0-9a-f]{40})", text)]
        known = [name._replace(revision=commit) for commit in commits if not name.revision]
        found = next((each for each in known if str(each) in kept), None) or resolve(name)
        logger.info("from the Hub: %s", found)
        names.append(str(found))
        return found

    names: list[str] = []
    chosen: list[str | Path] = []
    for source in sources:
        name = hub_name(source, "dataset") if str(source) else None
        chosen.append(source if name is None else str(pinned(name)))
    if tokenizer is not None and (name := hub_name(tokenizer)) is not None:
        tokenizer = download(pinned(name), TOKENIZER)
    return chosen, tokenizer, names


def made_from(folder: Path) -> list[str]:
    """The names on the Hub that the dataset in a folder was made from; none where it has none."""
    try:
        found = read_object(folder / "dataset.json").get(FROM_HUB)
    except (OSError, JsonError):
        return []
    names = found if isinstance(found, list) else []
    return [name for name in names if isinstance(name, str)]


def held_out_on_hub(sources: Iterable[str | Path], purpose: str) -> list[Path]:
    """The files of the splits for ``purpose``, "validation" or "test", of all inputs on the Hub."""
    names = (hub_name(source, "dataset") for source in sources if str(source))
    found = (dataset_on_hub(name) for name in names if name is not None)
    return [
        path
        for splits in found
        for name, paths in splits.items()
        if PURPOSES.get(name) == purpose
        for path in paths
    ]


def splits_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    """The splits of files, by their names alone."""
    files = sorted(files)
    sharded: dict[str, list[str]] = {}
    for path in files:
        if match := SHARDED.fullmatch(path):
            sharded.setdefault(match[1], []).append(path)
    if sharded:
        return sharded
    for part in (slice(None, -1), slice(-1, None)):  # the names of folders, then of files
        found = {
            split: [p for p in files if any(_has_word(n, words) for n in p.split("/")[part])]
            for split, words in WORDS.items()
        }
        if any(found.values()):
            return {split: paths for split, paths in found.items() if paths}
    return {"train": files} if files else {}


def _has_word(name: str, words: Iterable[str]) -> bool:
    return any(re.search(rf"(^|[-._ 0-9]){word}($|[-._ 0-9])", name) for word in words)


def _is_data(path: str, text: bool) -> bool:
    parts = path.split("/")
    if parts[-1] in IGNORED or any(part.startswith((".", "__")) for part in parts):
        return False
    file = Path(path)
    return bool(kind_of(file)) or (text and (file.suffix == ".txt" or is_packed(file)))


def _from_card(name: HubName, files: Sequence[str]) -> dict[str, list[str]]:
    """The splits that the head of README.md names; nothing where it names none."""
    if CARD not in file_names(name):
        return {}
    card = download(name, Wanted("card", lambda names: [CARD])) / CARD
    configs = [each for each in _configs(card) if each.get("data_files")]
    if not configs:
        return {}
    usual = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"]
    if len(configs) > 1 and not usual:
        named = ", ".join(_text(each.get("config_name"))[:40] for each in configs[:8])
        raise DataError(
            f"{name} has several configurations ({named}); give the folder or file of one: "
            f"{name._replace(path='PATH')}, with a PATH such as {files[0] if files else 'data'}"
        )
    return _splits_of(name, (usual or configs)[0]["data_files"], files)


def _splits_of(name: HubName, data_files: object, files: Sequence[str]) -> dict[str, list[str]]:
    if isinstance(data_files, Mapping):
        entries: list[Mapping[str, Any]] = [
            {"split": split, "path": paths} for split, paths in data_files.items()
        ]
    else:
        listed = data_files if isinstance(data_files, list) else [data_files]
        plain = [each for each in listed if isinstance(each, str)]
        entries = [each for each in listed if isinstance(each, Mapping)]
        entries += [{"split": "train", "path": plain}] if plain else []
    splits = {}
    for each in entries:
        paths = each.get("path")
        patterns = [_text(p) for p in (paths if isinstance(paths, list) else [paths])] or [""]
        found = [p for p in files if any(_matches(p, pattern) for pattern in patterns)]
        if not found:
            raise DataError(
                f"{name}: the head of its {CARD} names {patterns[0][:80]!r}, and there is no file "
                f"of rows of that name; {_has(files, name)}"
            )
        splits[_text(each.get("split", "train"))] = found
    return splits


def _text(value: object) -> str:
    """A text in YAML; nothing for a list or an object, which may hold itself many times over."""
    return str(value) if isinstance(value, str | int | float) else ""


def _matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern of ``fsspec``: ``*`` within a folder, ``**`` across folders."""
    parts, wanted = path.split("/"), pattern.removeprefix("./").split("/")
    if wanted[-1] == "**":
        wanted.append("*")
    ends = {0}  # how many parts those of the pattern so far may have matched
    for each in wanted:
        if each == "**":
            ends = {n for n in range(len(parts) + 1) if n >= min(ends, default=n + 1)}
        else:
            ends = {n + 1 for n in ends if n < len(parts) and fnmatchcase(parts[n], each)}
    return len(parts) in ends


def _configs(card: Path) -> list[dict[str, Any]]:
    """The configurations in the YAML between the first two lines ``---`` of a card."""
    import yaml  # no other input needs it

    with card.open("rb") as file:
        text = file.read(CARD_BYTES).decode(errors="replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: dates that are none
        return []
    found = head.get("configs") if isinstance(head, dict) else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _has(files: Sequence[str], name: HubName) -> str:
    """What a repository holds, or where to look for its rows."""
    if files:
        return f"there are {', '.join(files[:6])}{' ...' if len(files) > 6 else ''}"
    return (
        "it may hold a script, which llamax does not run, or files of another kind; try "
        f"hf://{name.page}{CONVERTED}"
    )
