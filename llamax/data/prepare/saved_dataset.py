"""Folders that ``datasets`` writes with ``save_to_disk``: a Dataset, or a DatasetDict.

::

    FOLDER/state.json                                   a Dataset: names its files in their order
           dataset_info.json
           data-00000-of-00002.arrow  data-00001-of-00002.arrow
    FOLDER/dataset_dict.json                            a DatasetDict: names its splits
           train/  validation/  ...                     each a Dataset

Of a DatasetDict the splits train, validation and test keep their purpose; others are left.

Source: ``datasets.arrow_dataset.Dataset.save_to_disk`` and ``datasets.load_from_disk``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamax.runtime.errors import DataError
from llamax.runtime.files import is_file_name
from llamax.runtime.json_reader import JsonError, read_object

STATE, SPLITS = "state.json", "dataset_dict.json"
PURPOSES = {  # of splits, by name
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


def is_saved(folder: Path) -> bool:
    """Whether a folder is a saved Dataset or DatasetDict."""
    return (folder / SPLITS).is_file() or (
        (folder / STATE).is_file() and (folder / "dataset_info.json").is_file()
    )


def splits_of(folder: Path) -> dict[str, Path]:
    """The folders of the splits of a DatasetDict by name; empty for a Dataset."""
    if not (folder / SPLITS).is_file():
        return {}
    names = _object(folder / SPLITS).get("splits")
    if not isinstance(names, list) or not all(map(is_file_name, names)):
        raise DataError(f"{folder / SPLITS}: names no splits; save the dataset again")
    for name in names:
        if not is_saved(folder / name):
            raise DataError(f"{folder}: its split {name!r} is missing; copy the folder again")
    return {name: folder / name for name in names}


def files_of(folder: Path) -> list[Path]:
    """The files of a Dataset in their order; DataError if one is missing."""
    state = _object(folder / STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder}: was saved by an old version of datasets, with the order of its rows in a "
            "file of its own; load it with a new version, and save it again"
        )
    found = state.get("_data_files")
    files = found if isinstance(found, list) else [None]
    names = [each.get("filename") if isinstance(each, dict) else None for each in files]
    if not all(map(is_file_name, names)):
        raise DataError(f"{folder / STATE}: names no files of rows; save the dataset again")
    paths = [folder / str(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: is missing, and {STATE} names it; copy the folder again")
    return paths


def files_of_split(folder: Path, split: str, left: list[str] | None = None) -> list[Path]:
    """The files of one split; ``split``: its name, or empty for train, or for any Dataset.

    ``left`` receives the other splits of a DatasetDict.  Raises DataError if there is no such
    split.
    """
    splits = splits_of(folder)
    if not splits:
        name = str(_object(folder / STATE).get("_split") or "train").partition("[")[0]
        if split not in ("", name):
            raise DataError(f"{folder}: has no split {split!r} (splits: {name})")
        return files_of(folder)
    if (chosen := split or "train") not in splits:
        raise DataError(
            f"{folder}: has no split {chosen!r} (splits: {', '.join(splits) or 'none'}); give the "
            f"folder of one, such as {folder / next(iter(splits), 'train')}"
        )
    if left is not None:
        left += [f"{path}/" for name, path in splits.items() if name != chosen]
    return files_of(splits[chosen])


def held_out(sources: Sequence[str | Path], purpose: str) -> list[Path]:
    """The folders of the splits for ``purpose``, "validation" or "test", of all DatasetDicts."""
    return [
        path
        for source in sources
        for name, path in splits_of(Path(source)).items()
        if PURPOSES.get(name) == purpose
    ]


def files_by_purpose(folder: Path, left: list[str]) -> Iterator[tuple[Path, str]]:
    """(file, "train", "validation" or "test") of all splits; "" for the files of a Dataset."""
    splits = splits_of(folder)
    if not splits:
        yield from ((path, "") for path in files_of(folder))
        return
    yield from ((path, "train") for path in files_of_split(folder, ""))
    for name, path in splits.items():
        purpose = PURPOSES.get(name, "")
        if not purpose:
            left.append(f"{path}/")
        elif purpose != "train":
            yield from ((file, purpose) for file in files_of(path))


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, JsonError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the dataset again") from None
