"""Which numbers of its rank a trace uses: ranks that agree on these trace the same programs.

A rank differs from the others in its place on each axis of the mesh, in the values of its tensors,
which no trace may read, and in nothing else.  So while a rank is traced its places are numbers that
note when anything uses their value: an operation, a comparison, an index, a conversion, or text.
Python cannot learn a value in another way, and neither can C, for which they are no ints::

    rank 9 = (data 1, tp 1)   traced   uses data 1          programs a, b
    rank 10 = (data 1, tp 2)  not traced: its trace would use data 1, and so go as that of rank 9
    rank 16 = (data 2, tp 0)  traced   uses data 2          programs to compare with a, b

What a trace does may depend on what it has used so far: all of it has to agree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from llamax.backends.tracing import Tracer
from llamax.backends.xla import XlaAxis
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Groups, Mesh, Seat

STAGE, ORDINAL = "stage", "ordinal"  # of a pipeline; the global rank, as torch-xla knows it
Places = dict[str, int]  # axis -> the place of a rank

# What tells nothing about a value.
_SILENT = {"__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__doc__"}
_SILENT |= {"__getattribute__", "__setattr__", "__delattr__", "__dir__", "__sizeof__"}
_ARITHMETIC = {"__add__", "__sub__", "__mul__", "__floordiv__", "__mod__", "__neg__"}
_ARITHMETIC |= {"__radd__", "__rsub__", "__rmul__"}


class RankNumber:
    """A place on an axis, or what sums and products make of it, which acts as an int.

    It adds the ``places`` that it comes from to ``used`` once something uses its value.
    """

    def __init__(self, value: int, places: Places, used: Places) -> None:
        self._value, self._places, self._used = value, places, used

    @property  # type: ignore[misc]  # isinstance(x, int) is true, as it is of the int in its place
    def __class__(self) -> type:
        return int

    def __getattr__(self, name: str) -> Any:
        return getattr(value_of(self), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), options: Any = None
    ) -> Any:
        return function(*plain(args), **plain(options or {}))


def value_of(x: Any) -> Any:
    """The value of a RankNumber, which is used from now on; anything else as it is."""
    if type(x) is not RankNumber:
        return x
    x._used.update(x._places)
    return x._value


def plain(x: Any) -> Any:
    """``x`` with ints in the place of the RankNumbers in its lists, tuples, dicts and slices."""
    if isinstance(x, dict):
        return {key: plain(each) for key, each in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(plain, x))
    return slice(*map(plain, (x.start, x.stop, x.step))) if type(x) is slice else value_of(x)


def _method(name: str) -> Callable[..., Any]:
    """``name`` of ints: the operator, which other types may implement too, or int's method."""
    plain_name = name.replace("__r", "__", 1)
    known: dict[str, Callable[..., Any]] = {**vars(operator), "__divmod__": divmod}
    if name not in known and plain_name in known:
        return lambda x, y: known[plain_name](y, x)
    return known.get(name) or getattr(int, name)


def _using(name: str) -> Callable[..., Any]:
    """A method that uses the value."""
    of_ints = _method(name)

    def method(self: RankNumber, *args: Any) -> Any:
        return of_ints(value_of(self), *map(value_of, args))

    return method


def _computing(name: str) -> Callable[..., Any]:
    """A method whose result is a RankNumber, where it is one of ints."""
    of_ints, using = _method(name), _using(name)

    def method(self: RankNumber, *args: Any) -> Any:
        numbers = [each for each in (self, *args) if type(each) is RankNumber]
        if any(type(each) not in (int, RankNumber) for each in args):
            return using(self, *args)
        values = [each._value if type(each) is RankNumber else each for each in (self, *args)]
        places = {axis: place for each in numbers for axis, place in each._places.items()}
        return RankNumber(of_ints(*values), places, self._used)

    return method


for _name in dir(int):
    if _name.startswith("__") and _name not in _SILENT:
        setattr(RankNumber, _name, (_computing if _name in _ARITHMETIC else _using)(_name))


class Watch:
    """What traces of ranks of a mesh used of their places; ``groups``: axis -> all its groups."""

    def __init__(self, mesh: Mesh, groups: Mapping[str, Groups]) -> None:
        self.mesh, self.traced = mesh, 0
        self._place = {
            axis: {rank: place for group in known for place, rank in enumerate(group)}
            for axis, known in groups.items()
        }
        # The size of an axis is no RankNumber: it has to be the same for all ranks.
        self.watches = all(len({*map(len, known)}) == 1 for known in groups.values())
        self._used: dict[tuple[str, ...], set[tuple[int, ...]]] = {}

    def places(self, rank: int) -> Places:
        """The place of a rank on every axis, its stage, and its number."""
        found = {axis: place[rank] for axis, place in self._place.items()}
        return found | {STAGE: self.mesh.coordinate(rank).pp, ORDINAL: rank}

    def knows(self, rank: int) -> bool:
        """Whether a trace of this rank would go as one that was noted."""
        places = self.places(rank)
        return any(
            tuple(places[axis] for axis in axes) in used for axes, used in self._used.items()
        )

    @property
    def used(self) -> list[str]:
        """The axes on which traces have used the place of a rank."""
        return sorted({axis for axes in self._used for axis in axes})

    def note(self, used: Places) -> None:
        """Note the places that the trace of a rank has used."""
        self.traced += 1
        self._used.setdefault((*used,), set()).add((*used.values(),))


def watched(axes: Axes, tracer: Tracer, used: Places) -> Axes:
    """The axes of a rank, whose places are RankNumbers."""

    def number(axis: str, place: int) -> Any:
        return RankNumber(place, {axis: place}, used)

    for field in fields(axes):
        axis = getattr(axes, field.name)
        if isinstance(axis, XlaAxis):
            axis.rank = number(axis.name, axis.rank)
    tracer.runtime._ORDINAL = number(ORDINAL, tracer.runtime._ORDINAL)
    return replace(axes, pp=Seat(number(STAGE, axes.pp.rank), axes.pp.size))
