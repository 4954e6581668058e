"""A pickle as data: a machine for the few instructions that tensors and plain containers need.

Python's own unpickler calls whatever a file names.  This one calls nothing of Python's: a name is
looked up in ``NAMES``, an instruction outside ``run`` ends the reading, and tensors come out as
``Tensor`` records that say which stored bytes they are.

::

    GLOBAL torch._utils _rebuild_tensor_v2 | BINPERSID ('storage', FloatStorage, '0', 'cpu', 6)
    ... REDUCE                             -> Tensor(storage '0', float32, shape (2, 3), ...)
    GLOBAL os system                       -> refused

Source: Python's pickletools, torch.serialization (what torch.save writes: protocol 2).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llamax.runtime.errors import CheckpointError

MOST_BYTES, MOST_DIMS = 64 << 20, 16
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}


class Storage(NamedTuple):
    """A run of ``length`` elements, called ``key`` in the archive."""

    key: str
    dtype: torch.dtype
    length: int


class Tensor(NamedTuple):
    """A tensor as the pickle describes it: elements of a storage, ``start`` and strides counted in
    them."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Reference:
    """torch_xla's place-holder for tensor number ``tid``, which lies in a file of its own."""

    tid: int = -1


class Refused(Exception):
    """What a pickle asks for that no tensor needs."""


class Call(NamedTuple):
    """A function that REDUCE may apply, in our own words."""

    apply: Callable[..., Any]


def _tensor(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any = None, *_hooks: Any
) -> Tensor:
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    for numbers in (shape, strides):
        plain = isinstance(numbers, tuple) and len(numbers) <= MOST_DIMS
        if not plain or not all(_natural(n) for n in numbers):
            raise Refused(f"a tensor with shape or strides {numbers!r:.80}")
    if not _natural(start) or len(shape) != len(strides):
        raise Refused(f"a tensor of shape {shape!r:.80} at {start!r:.80}")
    elements = 1
    last = start
    for length, stride in zip(shape, strides, strict=True):
        elements *= length
        last += (length - 1) * stride
    if elements and (last >= storage.length or elements > storage.length):
        raise Refused(f"a tensor of shape {list(shape)!r:.80} in {storage.length} elements")
    return Tensor(storage, start, shape, strides)


def _storage(kind: Any, dtype: Any, key: Any, _place: Any, length: Any) -> Storage:
    if kind != "storage" or not isinstance(dtype, Kind) or not isinstance(key, str):
        raise Refused(f"a persistent {kind!r:.80}")
    if not _natural(length):
        raise Refused(f"a storage of {length!r:.80} elements")
    return Storage(key, dtype.dtype, length)


class Kind(NamedTuple):
    """The class of a storage, which says the dtype."""

    dtype: torch.dtype


def _natural(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


NAMES: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(lambda data, _grad, _hooks: data),
    ("torch", "Size"): Call(lambda sizes: tuple(sizes)),
    ("collections", "OrderedDict"): Call(lambda: {}),
    ("torch_xla.utils.serialization", "TensorReference"): Reference,
    **{("torch", name): Kind(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
_MARK = object()


def read(data: bytes, where: str) -> Any:
    """What a pickle holds: containers, numbers, text, ``Tensor`` and ``Reference``.

    Raises CheckpointError that starts with ``where`` for anything else; nothing was executed.
    """
    try:
        if len(data) > MOST_BYTES:
            raise Refused(f"{len(data)} bytes of structure; {MOST_BYTES} are allowed")
        return _Machine().run(data)
    except Refused as error:
        why = str(error)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        why = f"no pickle that torch.save wrote ({type(error).__name__})"
    raise CheckpointError(
        f"{where} holds {why}; llamax reads tensors and plain containers only, and has executed "
        "nothing: save a state_dict"
    )


class _Machine:
    """A stack, and a memo of what was built."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        push, pop = self.stack.append, self.stack.pop
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return pop()
                case "MARK":
                    push(_MARK)
                case "NONE":
                    push(None)
                case "NEWTRUE" | "NEWFALSE":
                    push(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    push(argument)
                case "BINUNICODE" | "SHORT_BINUNICODE":
                    push(argument)
                case "EMPTY_DICT":
                    push({})
                case "EMPTY_LIST":
                    push([])
                case "EMPTY_TUPLE":
                    push(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self._tuple(int(opcode.name[-1]))
                case "TUPLE":
                    push(tuple(self._marked()))
                case "APPEND":
                    self._append([pop()])
                case "APPENDS":
                    self._append(self._marked())
                case "SETITEM":
                    value, key = pop(), pop()
                    self._set([key, value])
                case "SETITEMS":
                    self._set(self._marked())
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = self.stack[-1]
                case "BINGET" | "LONG_BINGET":
                    push(self.memo[argument])
                case "GLOBAL":
                    push(_named(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = pop(), pop()
                    push(_named(module, name))
                case "BINPERSID":
                    push(_storage(*pop()))
                case "REDUCE":
                    arguments, function = pop(), pop()
                    if not isinstance(function, Call) or not isinstance(arguments, tuple):
                        raise Refused(f"a call of {function!r:.80}")
                    push(function.apply(*arguments))
                case "NEWOBJ":
                    arguments, kind = pop(), pop()
                    if kind is not Reference or arguments != ():
                        raise Refused(f"an object of {kind!r:.80}")
                    push(Reference())
                case "BUILD":
                    self._build(pop())
                case other:
                    raise Refused(f"the instruction {other}")
        raise Refused("no end")

    def _marked(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Refused("a list without a beginning")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _tuple(self, length: int) -> None:
        values = self.stack[-length:]
        if len(values) < length:
            raise Refused("a tuple of nothing")
        self.stack[-length:] = [tuple(values)]

    def _append(self, values: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("an append to what is no list")
        self.stack[-1].extend(values)

    def _set(self, pairs: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(pairs) % 2:
            raise Refused("an entry of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):  # nested tuples are hashed by recursion
                raise Refused(f"a key of type {type(key).__name__}")
            self.stack[-1][key] = value

    def _build(self, state: Any) -> None:
        """State of an object: a reference's number; what a dict carries beside it is dropped."""
        target = self.stack[-1]
        if isinstance(target, Reference):
            if not isinstance(state, dict) or not _natural(state.get("tid")):
                raise Refused("a reference to no tensor")
            target.tid = state["tid"]
        elif type(target) is not dict:
            raise Refused(f"state for a {type(target).__name__}")


def _named(module: Any, name: Any) -> object:
    if not isinstance(module, str) or (module, name) not in NAMES:
        raise Refused(f"{module!s:.80}.{name!s:.80}, which is neither tensor nor plain container")
    return NAMES[module, name]
