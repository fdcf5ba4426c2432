"""A pickle reader that cannot run code: it knows few opcodes, and maps a few names to plain stand-ins.

Python's own pure-Python unpickler is used, with most of its opcodes taken out: the one in C can be made to allocate
gigabytes by one memo index, and reads past the end of a pickle that is followed by tensors (the legacy format).
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from merge.dtypes import DTYPES
from merge.errors import CheckpointError, first_line
from merge.limits import MAX_SIZES
from merge.quoting import clipped, quoted

# Enough for 100,000 tensors. One byte of pickle is an instruction, which can make 170 bytes of objects.
MAX_PICKLE_BYTES = 32 * 2**20
MAX_INSTRUCTIONS = 4_000_000
_MAX_NUMBER = 2**63


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage of numbers. `key` names its record; `dtype` None: bytes; `numel`, `first` in elements of dtype."""

    key: str
    dtype: str | None
    numel: int
    first: int = 0


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage; `first` and `strides` in elements of dtype."""

    storage: Storage
    dtype: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _DTypeMark:
    """Stand-in for torch.float32 or torch.FloatStorage; None: UntypedStorage."""

    dtype: str | None


class NotWeightsError(Exception):
    """Raised if the pickle holds something that weights do not need."""


def load(
    path: str, file: IO[bytes], limit: int = MAX_PICKLE_BYTES, storages: dict[str, Storage] | None = None
) -> object:
    """One pickle, from the file's position; afterwards the position is right behind it.

    Args:
        path: for messages.
        file: a buffered binary file.
        limit: bytes; a longer pickle is an error.
        storages: gets each storage that is named, under its key, as it is named first.

    Returns:
        Dictionaries, lists, tuples, numbers, strings and StoredTensor. Nothing in it has been checked against the file.

    Raises:
        CheckpointError: it is damaged, too large, or holds anything else.
    """
    try:
        return _Weights(_Window(file, limit), {} if storages is None else storages).load()
    except NotWeightsError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # any error of damaged bytes
        reason = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: its pickle is damaged ({reason}). Download the file again.") from None


class _Window:
    """Limits reads to `limit` bytes, so that a damaged length cannot ask for gigabytes."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, size: int, /) -> bytes:
        if not 0 <= size <= self._left:
            raise EOFError(f"{size:,} bytes wanted, {self._left:,} left")
        data = self._file.read(size)
        self._left -= len(data)
        if len(data) < size:
            raise EOFError("the file ends in the middle")
        return data

    def readline(self) -> bytes:
        data = self._file.readline(min(self._left, 65536))
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise EOFError("a line without end")
        return data


# --- the names that weights need ---------------------------------------------------------------------------------


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, dtype: str | None = None) -> StoredTensor:
    dtype = dtype or getattr(storage, "dtype", None)
    if not isinstance(storage, Storage) or dtype is None:
        raise NotWeightsError("a tensor without a storage or dtype; the file is damaged")
    if (
        not all(isinstance(sizes, (tuple, list)) and len(sizes) <= MAX_SIZES for sizes in (shape, strides))
        or not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in (first, *shape, *strides))
        or len(shape) != len(strides)
    ):
        raise NotWeightsError(
            f"a tensor with offset {quoted(first)}, shape {quoted(shape)}, strides {quoted(strides)}; expected integers"
        )
    return StoredTensor(storage, dtype, first, tuple(shape), tuple(strides))


def _rebuild_tensor_v2(
    storage: object, first: object, shape: object, strides: object, grad: object, hooks: object, metadata: object = None
) -> StoredTensor:
    if metadata:
        raise NotWeightsError("a tensor that is stored negated or conjugated; save its plain values")
    return _rebuild_tensor(storage, first, shape, strides)


def _rebuild_tensor_v3(
    storage: object,
    first: object,
    shape: object,
    strides: object,
    grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> StoredTensor:
    if metadata or not isinstance(dtype, _DTypeMark):
        raise NotWeightsError("a tensor that is stored negated, conjugated or without a dtype; save its plain values")
    return _rebuild_tensor(storage, first, shape, strides, dtype.dtype)


def _rebuild_parameter(data: object, grad: object, hooks: object) -> object:
    return data


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes[: MAX_SIZES + 1])


_ORDERED_DICT = "collections.OrderedDict"
_NAMES: dict[str, Callable[..., Any] | _DTypeMark] = {
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.storage.UntypedStorage": _DTypeMark(None),
    **{f"torch.{dtype.torch_name}": _DTypeMark(dtype.name) for dtype in DTYPES.values()},
}
_STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL"}
_STORAGES |= {"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8"}
_NAMES |= {
    f"{module}.{kind}Storage": _DTypeMark(dtype)
    for kind, dtype in _STORAGES.items()
    for module in ("torch", "torch.cuda")
}

# --- the reader --------------------------------------------------------------------------------------------------

# No opcode that makes an instance (OBJ, NEWOBJ), reads copyreg's registry (EXT) or makes sets and buffers.
_OPCODES = frozenset(
    re.findall(
        r"\w+",
        """
        PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE
        NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
        BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
        LIST EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL INST REDUCE BUILD BINPERSID
        """,
    )
)


def _plain_key(key: object) -> object:
    # A tuple as a key would be hashed; a few hundred bytes of nested tuples can make that endless.
    if not isinstance(key, (str, int, float, bytes)) and key is not None:
        raise NotWeightsError(f"a dictionary with a {type(key).__name__} as key; expected names")
    if isinstance(key, str):
        key.encode()  # half a surrogate pair, which pickles can hold, cannot be written again
    if isinstance(key, int) and abs(key) >= _MAX_NUMBER:
        raise NotWeightsError("a dictionary with a number of more than 64 bits as key; expected names")
    return key


def _counted(act: Callable[[Any], None]) -> Callable[[Any], None]:
    """Counts one instruction of the allowed number."""

    def run(unpickler: Any) -> None:
        unpickler.spend(1)
        act(unpickler)

    return run


class _Weights(pickle._Unpickler):
    stack: list[Any]  # of the base class, like pop_mark
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        ord(opcode.code): _counted(pickle._Unpickler.dispatch[ord(opcode.code)])
        for opcode in pickletools.opcodes
        if opcode.name in _OPCODES
    }

    def __init__(self, file: _Window, storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="utf-8")  # names in pickles of Python 2 are bytes
        self._storages = storages
        self._left = MAX_INSTRUCTIONS

    def spend(self, instructions: int) -> None:
        self._left -= instructions
        if self._left < 0:
            raise NotWeightsError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions; not loaded")

    def find_class(self, module: str, name: str, /) -> object:
        if f"{module}.{name}" == _ORDERED_DICT:
            return self._ordered_dict
        found = _NAMES.get(f"{module}.{name}")
        if found is None:
            module, name = clipped(module), clipped(name)
            if module == "torch" and name.endswith("Storage"):
                raise NotWeightsError(f"holds tensors of type torch.{name}, which are not read. Convert the model.")
            raise NotWeightsError(
                f"contains code ({module}.{name}) where weights are expected; not loaded, and nothing was run. "
                "If you trust its source, save its state_dict as safetensors."
            )
        return found

    def _ordered_dict(self, items: Any = ()) -> OrderedDict[Any, Any]:
        """Makes an OrderedDict from a list of pairs, as pickles of Python 2 do; the list may be used many times."""
        self.spend(len(items))
        result: OrderedDict[Any, Any] = OrderedDict()
        for key, value in items:
            result[_plain_key(key)] = value
        return result

    def persistent_load(self, saved: object, /) -> Storage:
        if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] not in ("storage", b"storage"):
            raise NotWeightsError("a persistent id that is not a storage; the file is damaged")
        _, mark, key, location, numel, *view = saved
        is_count = type(numel) is int and 0 <= numel < _MAX_NUMBER
        if not isinstance(mark, _DTypeMark) or not isinstance(key, str) or not is_count:
            raise NotWeightsError("a storage without a type, name or length; the file is damaged")
        if location == "meta":
            raise NotWeightsError(f"storage {clipped(key)} is on the meta device: the file has shapes but no numbers")
        storage = self._storages.setdefault(key, Storage(key, mark.dtype, numel))
        if (storage.dtype, storage.numel) != (mark.dtype, numel):
            raise NotWeightsError(f"storage {clipped(key)} has two types or lengths; the file is damaged")
        if view and view[0] is not None:  # written by torch before 1.0: (name, offset, length)
            _, first, length = view[0]
            if not all(type(number) is int and number >= 0 for number in (first, length)) or first + length > numel:
                raise NotWeightsError(f"a view that goes beyond its storage {clipped(key)}; the file is damaged")
            return Storage(key, mark.dtype, numel, first)
        return storage

    def _build(self) -> None:
        """Drops attributes of an OrderedDict (a state_dict's _metadata); no other object may have any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise NotWeightsError(f"attributes for a {type(self.stack[-1]).__name__}; the file is damaged")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise NotWeightsError("items for something that is not a dictionary; the file is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def _unknown(self) -> None:
        raise NotWeightsError("its pickle uses an opcode that weights do not need; not loaded")


_Weights.dispatch |= {pickle.BUILD[0]: _counted(_Weights._build)}
_Weights.dispatch |= {pickle.SETITEM[0]: _counted(_Weights._setitem), pickle.SETITEMS[0]: _counted(_Weights._setitems)}
_Weights.dispatch |= {code: _Weights._unknown for code in pickle._Unpickler.dispatch if code not in _Weights.dispatch}
