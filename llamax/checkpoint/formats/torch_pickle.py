"""Reading pickles as data, without executing them.

Python's unpickler calls every function and builds every class that a file names.  This interpreter
does neither: tensors become ``PickledTensor`` records of the stored elements they consist of, and
every other object (an argparse.Namespace, a numpy array, an omegaconf node) an ``InertObject`` that
has only its name; what is put into it is dropped.  A name that runs code ends the reading, since no
trainer writes it, and so does an instruction that ``_Machine.run`` does not know.

::

    GLOBAL torch._utils _rebuild_tensor_v2 | BINPERSID ('storage', FloatStorage, '0', 'cpu', 6)
    ... REDUCE                             -> PickledTensor(storage '0', float32, shape (2, 3), ...)
    GLOBAL argparse Namespace, NEWOBJ      -> InertObject('argparse.Namespace')
    GLOBAL os system                       -> refused

Source: Python's pickletools, torch.serialization (what torch.save writes: protocol 2).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from types import NoneType
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
    """The placeholder for tensor number ``tid``, which is in a separate file (xser).

    torch_xla and neuronx-nemo-megatron write it.
    """

    tid: int = -1


class InertObject:
    """An object, function or class in a pickle that llamax does not build; only its name is known.

    ``tensor``: whether it is a tensor, of a kind that llamax does not read.
    """

    __slots__ = ("name", "tensor")

    def __init__(self, name: str, tensor: bool = False) -> None:
        self.name, self.tensor = name, tensor

    def __repr__(self) -> str:
        return self.name


class UnsupportedPickle(Exception):
    """Something in a pickle that llamax refuses."""


class AllowedCall(NamedTuple):
    """A function of this module that REDUCE may call in place of the named one."""

    apply: Callable[..., Any]


def _tensor(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any = None, *_hooks: Any
) -> PickledTensor | InertObject:
    if isinstance(storage, InertObject):
        return InertObject(f"a tensor in a {storage.name}", tensor=True)
    if not isinstance(storage, PickledStorage):
        raise UnsupportedPickle("a tensor without a storage")
    for numbers in (shape, strides):
        plain = isinstance(numbers, tuple) and len(numbers) <= MAX_DIMS
        if not plain or not all(_natural(n) for n in numbers):
            raise UnsupportedPickle(f"a tensor with shape or strides {_shown(numbers)}")
    if not _natural(start) or len(shape) != len(strides):
        raise UnsupportedPickle(f"a tensor of shape {_shown(shape)} at {_shown(start)}")
    elements = 1
    last = start
    for length, stride in zip(shape, strides, strict=True):
        elements *= length
        last += (length - 1) * stride
    if elements and (last >= storage.length or elements > storage.length):
        raise UnsupportedPickle(f"a tensor of shape {_shown(shape)} in {storage.length} elements")
    return PickledTensor(storage, start, shape, strides)


def _subclassed(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, or an object of a subclass of Tensor."""
    plain = isinstance(function, AllowedCall) and function.apply is not _subclassed
    if kind is TENSOR_TYPE and plain:
        return function.apply(*arguments)
    return InertObject(kind.name if isinstance(kind, InertObject) else "an object", tensor=True)


def _storage(
    kind: Any, dtype: Any, key: Any, _place: Any, length: Any
) -> PickledStorage | InertObject:
    if kind == "storage" and isinstance(dtype, InertObject):
        return dtype
    if kind != "storage" or not isinstance(dtype, StorageType) or not isinstance(key, str):
        raise UnsupportedPickle(f"a persistent {_shown(kind)}")
    if not _natural(length):
        raise UnsupportedPickle(f"a storage of {_shown(length)} elements")
    return PickledStorage(key, dtype.dtype, length)


class StorageType(NamedTuple):
    """A storage class such as torch.FloatStorage, by its dtype."""

    dtype: torch.dtype


def _natural(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


TENSOR_TYPE = InertObject("torch.Tensor")
ALLOWED_NAMES: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): AllowedCall(_tensor),
    ("torch._utils", "_rebuild_parameter"): AllowedCall(lambda data, _grad, _hooks: data),
    ("torch._utils", "_rebuild_parameter_with_state"): AllowedCall(
        lambda data, _grad, _hooks, _state: data
    ),
    ("torch._tensor", "_rebuild_from_type_v2"): AllowedCall(_subclassed),
    ("torch", "Tensor"): TENSOR_TYPE,
    ("torch.nn.parameter", "Parameter"): TENSOR_TYPE,
    ("torch", "Size"): AllowedCall(lambda sizes: tuple(sizes)),
    ("collections", "OrderedDict"): AllowedCall(lambda: {}),
    ("collections", "defaultdict"): AllowedCall(lambda _factory=None: {}),
    ("torch_xla.utils.serialization", "TensorReference"): XlaReference,
    ("nemo.collections.nlp.parts.serialization", "TensorReference"): XlaReference,
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}
CODE_MODULES = {
    *("_pickle", "bdb", "code", "codeop", "commands", "ctypes", "distutils", "importlib"),
    *("marshal", "multiprocessing", "nt", "os", "pdb", "pickle", "pip", "posix", "pty", "runpy"),
    *("shutil", "site", "socket", "subprocess", "sys", "timeit", "webbrowser"),
}
CODE_NAMES = {
    "builtins": {"eval", "exec", "compile", "open", "input", "breakpoint", "__import__"},
    "io": {"open", "open_code", "FileIO"},
    "_io": {"open", "open_code", "FileIO"},
    "types": {"CodeType", "FunctionType"},
    "torch": {"load", "compile"},
    "torch.hub": {"load", "load_state_dict_from_url", "download_url_to_file"},
    "torch.jit": {"load"},
    "torch.serialization": {"load"},
}
CODE_NAMES["__builtin__"] = CODE_NAMES["builtins"]
KEY_TYPES = (str, int, float, bool, bytes, NoneType, InertObject, torch.dtype)
MAX_KEY_LENGTH = 16  # of tuples as keys of dicts, which are hashed each time
_MARK = object()
SET, LARGE_INTEGER = InertObject("a set"), InertObject("an integer of over 255 bytes")


def read_pickle(data: bytes, where: str) -> Any:
    """The contents of a pickle: containers, numbers, text, bytes, ``PickledTensor``,
    ``XlaReference``, and ``InertObject`` for every other object.

    Raises CheckpointError, which names ``where``, for names that run code and for what no trainer
    writes; nothing is executed.
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
                case "LONG4":
                    push(LARGE_INTEGER)
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                    push(argument)
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                    push(bytes(argument))
                case "EMPTY_DICT":
                    push({})
                case "EMPTY_LIST":
                    push([])
                case "EMPTY_TUPLE":
                    push(())
                case "EMPTY_SET":
                    push(SET)
                case "ADDITEMS":
                    self._marked()
                    if self.stack[-1] is not SET:
                        raise UnsupportedPickle("an element of something that is not a set")
                case "FROZENSET":
                    self._marked()
                    push(SET)
                case "POP":
                    pop()
                case "POP_MARK":
                    self._marked()
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
                    push(_called(function, arguments))
                case "NEWOBJ":
                    arguments, kind = pop(), pop()
                    push(_created(kind, arguments))
                case "NEWOBJ_EX":
                    _, arguments, kind = pop(), pop(), pop()
                    push(_created(kind, arguments))
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
        if isinstance(self.stack[-1], InertObject):
            return
        if type(self.stack[-1]) is not list:
            raise UnsupportedPickle("an append to something that is not a list")
        self.stack[-1].extend(values)

    def _set(self, pairs: Sequence[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, InertObject):
            return
        if type(target) is not dict or len(pairs) % 2:
            raise UnsupportedPickle("an entry of something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not _is_key(key):
                raise UnsupportedPickle(f"a key of type {type(key).__name__}")
            target[key] = value

    def _build(self, state: Any) -> None:
        """Set the number of a reference; the attributes of all other objects are dropped."""
        target = self.stack[-1]
        if isinstance(target, XlaReference):
            if not isinstance(state, dict) or not _natural(state.get("tid")):
                raise UnsupportedPickle("a reference without a tensor number")
            target.tid = state["tid"]
        elif type(target) is not dict and not isinstance(target, InertObject):
            raise UnsupportedPickle(f"state for a {type(target).__name__}")


def _called(function: Any, arguments: Any) -> Any:
    """The result of REDUCE: nothing but the functions of this module is called."""
    if not isinstance(arguments, tuple):
        raise UnsupportedPickle(f"a call of {_shown(function)}")
    if isinstance(function, AllowedCall):
        return function.apply(*arguments)
    if not isinstance(function, InertObject):
        raise UnsupportedPickle(f"a call of {_shown(function)}")
    rebuilt = function.name.startswith("torch.") and "._rebuild_" in function.name
    return InertObject(function.name, tensor=True) if rebuilt else function


def _created(kind: Any, arguments: Any) -> Any:
    """The result of NEWOBJ: a new reference, or an inert object."""
    if isinstance(kind, InertObject):
        return kind
    if kind is not XlaReference or arguments != ():
        raise UnsupportedPickle(f"an object of {_shown(kind)}")
    return XlaReference()


def _shown(value: object) -> str:
    """A value for a message; the text of a nested one could double with each level."""
    if type(value) is tuple and len(value) <= MAX_DIMS and all(type(n) is int for n in value):
        return str(list(value))[:80]
    if type(value) in (int, float, str, bytes, bool) or isinstance(value, InertObject):
        return f"{value!r:.80}"
    return f"a {getattr(value, '__name__', type(value).__name__)}"


def _is_key(key: object) -> bool:
    if type(key) is tuple and len(key) <= MAX_KEY_LENGTH:
        return all(type(element) in KEY_TYPES for element in key)
    return type(key) in KEY_TYPES


def _named(module: Any, name: Any) -> object:
    """The value of a name: an entry of ``ALLOWED_NAMES``, or else an ``InertObject``."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnsupportedPickle("a name that is not text")
    if (module, name) in ALLOWED_NAMES:
        return ALLOWED_NAMES[module, name]
    if module.partition(".")[0] in CODE_MODULES or name in CODE_NAMES.get(module, ()):
        raise UnsupportedPickle(f"{module:.80}.{name:.80}, which runs code")
    return InertObject(f"{module:.80}.{name:.80}")
