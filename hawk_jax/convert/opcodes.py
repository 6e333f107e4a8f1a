"""The pickle inside a checkpoint of torch, read opcode by opcode and never loaded: nothing in it is run.

A stack of plain values takes what the opcodes make: dicts, lists, numbers, texts and descriptions of tensors; any callable but those of
`ALLOWED` is refused by name.  Texts, keys and shapes are checked for their types before anything is done with them: nested references can
make a small pickle stand for a tree without end.  Source: the documentation of pickletools.
"""
import math
import pickletools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hawk_jax.convert.lazy import LazyError, possible, shown

STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16, "DoubleStorage": np.float64,
            "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
            "BoolStorage": np.bool_}
EXPANDED = 1 << 24              # values; a tensor may have more than its storage only up to this: expand() leaves such ones


class PthError(LazyError):
    """A checkpoint file that is damaged, of another kind, or would run code."""


class Global(NamedTuple):
    name: str


class Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# ------------------------------------------------------------------------------------------------ what a pickle may call
def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    sound = (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
             and possible(shape, storage.dtype) and all(type(n) is int and 0 <= n < 2**59 for n in (offset, *strides)))
    if not sound or math.prod(shape) > max(storage.count, EXPANDED):
        raise PthError("describes a tensor that cannot be; the file is damaged or forged")
    if metadata:
        raise PthError("holds a tensor that is to be changed when it is loaded; clone it there and save it again")
    return Tensor(storage, offset, shape, strides)


def _size(sizes=()):
    if not isinstance(sizes, (tuple, list)) or not possible(sizes, np.dtype(np.uint8)):
        raise PthError("describes a torch.Size that cannot be; the file is damaged or forged")
    return tuple(sizes)


def _device(kind, index=None):
    if not isinstance(kind, str) or not isinstance(index, (int, type(None))):
        raise PthError("describes a torch.device that cannot be; the file is damaged or forged")
    return kind if index is None else f"{kind}:{index}"


ALLOWED = {
    "collections.OrderedDict": lambda: {},      # filled afterwards
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": _size,
    "torch.device": _device,
    **{f"torch.{name}": None for name in STORAGES},         # named in references to storages, never called
}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
            "SHORT_BINBYTES", "INT", "LONG", "FLOAT", "UNICODE"}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
NOTHING = {"PROTO", "FRAME", "STOP"}


class Reader:
    """Runs the opcodes of one pickle on `stack`; `memo` holds what the pickle refers to again."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def run(self, content: bytes):
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in LITERALS:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name not in NOTHING:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise PthError(f"holds a pickle with the operation {name}, which no checkpoint of tensors needs; refused, nothing "
                                   "was run")
                step(argument)
        return self.stack.pop()

    def _since_mark(self) -> list:
        at = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is MARK)
        values = self.stack[at + 1:]
        del self.stack[at:]
        return values

    def _mark(self, _):
        self.stack.append(MARK)

    def _tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def _last(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)

    def _tuple1(self, _):
        self._last(1)

    def _tuple2(self, _):
        self._last(2)

    def _tuple3(self, _):
        self._last(3)

    def _append(self, _):
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _):
        values = self._since_mark()
        self.stack[-1].extend(values)

    def _set(self, pairs: list) -> None:
        for key in pairs[::2]:
            if not isinstance(key, (str, int, float, bytes, type(None))):   # the hash of a nested tuple may take forever
                raise PthError(f"has a {type(key).__name__} as a key of a dict, which no checkpoint of tensors needs")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def _setitem(self, _):
        pair = self.stack[-2:]
        del self.stack[-2:]
        self._set(pair)

    def _setitems(self, _):
        self._set(self._since_mark())

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, number):
        self.memo[number] = self.stack[-1]

    def _binget(self, number):
        self.stack.append(self.memo[number])

    _long_binput, _long_binget, _put, _get = _binput, _binget, _binput, _binget

    def _global(self, name: str):
        module, _, attribute = name.partition(" ")
        self._push_global(f"{module}.{attribute}")

    def _stack_global(self, _):
        attribute, module = self.stack.pop(), self.stack.pop()
        if not isinstance(attribute, str) or not isinstance(module, str):
            raise PthError("holds a pickle that calls what has no name; refused, nothing was run")
        self._push_global(f"{module}.{attribute}")

    def _push_global(self, name: str) -> None:
        if name not in ALLOWED:
            raise PthError(f"holds a pickle that would call {shown(name)}; refused, nothing was run. Such a file is no plain checkpoint: "
                           "get it from its authors, as safetensors if they have it")
        self.stack.append(Global(name))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or ALLOWED[function.name] is None or not isinstance(arguments, tuple) or len(arguments) > 8:
            raise PthError("holds a pickle that calls what is no function; refused, nothing was run")
        self.stack.append(ALLOWED[function.name](*arguments))

    def _build(self, _):
        self.stack.pop()        # attributes of a dict: `_metadata` of state_dict(), which nothing here needs
        if not isinstance(self.stack[-1], dict):
            raise PthError("holds a pickle that sets attributes of what is no dict; refused, nothing was run")

    def _binpersid(self, _):
        kind, storage, key, _, count = self.stack.pop()
        if (kind != "storage" or not isinstance(storage, Global) or not isinstance(key, str)
                or not possible((count,), np.dtype(np.float64))):
            raise PthError("refers to something that is no storage; the file is damaged or forged")
        self.stack.append(Storage(key, np.dtype(STORAGES[storage.name.removeprefix("torch.")]), count))
