"""Reading pickles as data, without executing them.

Python's unpickler calls every function that a file names.  This interpreter calls none of them: a
name must be in ``ALLOWED_NAMES``, an instruction that ``_Machine.run`` does not know ends the
reading, and tensors become ``PickledTensor`` records of the stored elements they consist of.

::

    GLOBAL torch._utils _rebuild_tensor_v2 | BINPERSID ('storage', FloatStorage, '0', 'cpu', 6)
    ... REDUCE                             -> PickledTensor(storage '0', float32, shape (2, 3), ...)
    GLOBAL os system                       -> refused

Source: Python's pickletools, torch.serialization (what torch.save writes: protocol 2).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from llamax.runtime.errors import CheckpointError

MAX_BYTES, MAX_DIMS = 64 << 20, 16
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


class PickledStorage(NamedTuple):
    """``length`` elements of one dtype, in the archive entry ``key``."""

    key: str
    dtype: torch.dtype
    length: int


class PickledTensor(NamedTuple):
    """A tensor in a pickle: a storage, and the shape of its elements in it.

    ``start`` and ``strides`` count elements.
    """

    storage: PickledStorage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class XlaReference:
    """The placeholder of torch_xla for tensor number ``tid``, which is in a separate file."""

    tid: int = -1


class UnsupportedPickle(Exception):
    """Something in a pickle that tensors and plain containers do not need."""


class AllowedCall(NamedTuple):
    """A function of this module that REDUCE may call in place of the named one."""

    apply: Callable[..., Any]


def _tensor(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any = None, *_hooks: Any
) -> PickledTensor:
    if not isinstance(storage, PickledStorage):
        raise UnsupportedPickle("a tensor without a storage")
    for numbers in (shape, strides):
        plain = isinstance(numbers, tuple) and len(numbers) <= MAX_DIMS
        if not plain or not all(_natural(n) for n in numbers):
            raise UnsupportedPickle(f"a tensor with shape or strides {numbers!r:.80}")
    if not _natural(start) or len(shape) != len(strides):
        raise UnsupportedPickle(f"a tensor of shape {shape!r:.80} at {start!r:.80}")
    elements = 1
    last = start
    for length, stride in zip(shape, strides, strict=True):
        elements *= length
        last += (length - 1) * stride
    if elements and (last >= storage.length or elements > storage.length):
        raise UnsupportedPickle(
            f"a tensor of shape {list(shape)!r:.80} in {storage.length} elements"
        )
    return PickledTensor(storage, start, shape, strides)


def _storage(kind: Any, dtype: Any, key: Any, _place: Any, length: Any) -> PickledStorage:
    if kind != "storage" or not isinstance(dtype, StorageType) or not isinstance(key, str):
        raise UnsupportedPickle(f"a persistent {kind!r:.80}")
    if not _natural(length):
        raise UnsupportedPickle(f"a storage of {length!r:.80} elements")
    return PickledStorage(key, dtype.dtype, length)


class StorageType(NamedTuple):
    """A storage class such as torch.FloatStorage, by its dtype."""

    dtype: torch.dtype


def _natural(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


ALLOWED_NAMES: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): AllowedCall(_tensor),
    ("torch._utils", "_rebuild_parameter"): AllowedCall(lambda data, _grad, _hooks: data),
    ("torch", "Size"): AllowedCall(lambda sizes: tuple(sizes)),
    ("collections", "OrderedDict"): AllowedCall(lambda: {}),
    ("torch_xla.utils.serialization", "TensorReference"): XlaReference,
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
_MARK = object()


def read_pickle(data: bytes, where: str) -> Any:
    """The contents of a pickle: containers, numbers, text, ``PickledTensor``, ``XlaReference``.

    Raises CheckpointError, which names ``where``, for anything else; nothing is executed.
    """
    try:
        if len(data) > MAX_BYTES:
            raise UnsupportedPickle(f"{len(data)} bytes of structure; {MAX_BYTES} are allowed")
        return _Machine().run(data)
    except UnsupportedPickle as error:
        why = str(error)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        why = f"a pickle that torch.save did not write ({type(error).__name__})"
    raise CheckpointError(
        f"{where} holds {why}; llamax reads tensors and plain containers only, and has executed "
        "nothing: save a state_dict"
    )


class _Machine:
    """The interpreter: a stack, and the memo of values that were built."""

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
                    if not isinstance(function, AllowedCall) or not isinstance(arguments, tuple):
                        raise UnsupportedPickle(f"a call of {function!r:.80}")
                    push(function.apply(*arguments))
                case "NEWOBJ":
                    arguments, kind = pop(), pop()
                    if kind is not XlaReference or arguments != ():
                        raise UnsupportedPickle(f"an object of {kind!r:.80}")
                    push(XlaReference())
                case "BUILD":
                    self._build(pop())
                case other:
                    raise UnsupportedPickle(f"the instruction {other}")
        raise UnsupportedPickle("a pickle without an end")

    def _marked(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise UnsupportedPickle("a list without a beginning")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _tuple(self, length: int) -> None:
        values = self.stack[-length:]
        if len(values) < length:
            raise UnsupportedPickle("a tuple without elements")
        self.stack[-length:] = [tuple(values)]

    def _append(self, values: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnsupportedPickle("an append to something that is not a list")
        self.stack[-1].extend(values)

    def _set(self, pairs: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(pairs) % 2:
            raise UnsupportedPickle("an entry of something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):  # nested tuples are hashed by recursion
                raise UnsupportedPickle(f"a key of type {type(key).__name__}")
            self.stack[-1][key] = value

    def _build(self, state: Any) -> None:
        """Set the number of a reference; the attributes of a dict (``_metadata``) are dropped."""
        target = self.stack[-1]
        if isinstance(target, XlaReference):
            if not isinstance(state, dict) or not _natural(state.get("tid")):
                raise UnsupportedPickle("a reference without a tensor number")
            target.tid = state["tid"]
        elif type(target) is not dict:
            raise UnsupportedPickle(f"state for a {type(target).__name__}")


def _named(module: Any, name: Any) -> object:
    if not isinstance(module, str) or (module, name) not in ALLOWED_NAMES:
        raise UnsupportedPickle(
            f"{module!s:.80}.{name!s:.80}, which is neither a tensor nor a plain container"
        )
    return ALLOWED_NAMES[module, name]
