"""Torch pickles without torch: right places, no code run, every damage named."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge.checkpoint.pickle_file import read_pickle
from merge.checkpoint.reader import SourceReader
from merge.checkpoint.unpickler import MAX_INSTRUCTIONS
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import SourceFile, Stored, TensorRef

FORMATS = [True, False]  # _use_new_zipfile_serialization


def save(path: Path, value: Any, is_zip: bool = True) -> str:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return str(path)


def read(ref: TensorRef) -> torch.Tensor:
    out = np.empty(ref.size, DTYPES[ref.dtype].numpy_name)
    with SourceReader([SourceFile.now(ref.file)]) as reader:
        reader.read_into(ref, 0, out)
    dtype = getattr(torch, DTYPES[ref.dtype].torch_name)
    return (
        torch.frombuffer(bytearray(out.tobytes()), dtype=dtype).reshape(ref.shape)
        if out.size
        else torch.empty(ref.shape)
    )


def refused(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_zip", FORMATS)
def test_every_dtype_is_found_where_torch_put_it(tmp_path: Path, is_zip: bool) -> None:
    value = torch.arange(-3, 3).reshape(2, 3)
    tensors = {dtype.name: value.to(getattr(torch, dtype.torch_name)) for dtype in DTYPES.values()}
    refs, notes = read_pickle(save(tmp_path / "a.bin", tensors, is_zip))
    assert [ref.name for ref in refs] == list(tensors)
    assert notes == []
    for ref in refs:
        assert (ref.dtype, ref.shape, isinstance(ref, Stored)) == (ref.name, (2, 3), True)
        assert torch.equal(read(ref).view(torch.uint8), tensors[ref.name].view(torch.uint8))


@pytest.mark.parametrize("is_zip", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    assert torch.equal(read(read_pickle(str(path))[0][0]), torch.arange(4.0))


@pytest.mark.parametrize("is_zip", FORMATS)
def test_a_module_state_dict_with_tied_weights(tmp_path: Path, is_zip: bool) -> None:
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)
    head.weight = embedding.weight
    state = torch.nn.ModuleDict({"embed": embedding, "head": head}).state_dict()
    assert isinstance(state, OrderedDict)
    refs, _ = read_pickle(save(tmp_path / "a.bin", state, is_zip))
    places = {ref.name: ref for ref in refs}
    assert places["embed.weight"].offset == places["head.weight"].offset
    for name, tensor in state.items():
        assert torch.equal(read(places[name]), tensor)


@pytest.mark.parametrize("is_zip", FORMATS)
def test_views_that_are_not_contiguous(tmp_path: Path, is_zip: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "steps": base[::2, ::3],
        "expanded": base[:, :1].expand(4, 7),
        "scalar": base[2, 3],
        "swapped": base.reshape(2, 2, 6).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(base.t()),
        "empty": base[:0],
    }
    refs, _ = read_pickle(save(tmp_path / "a.bin", views, is_zip))
    for ref in refs:
        assert torch.equal(read(ref), views[ref.name].detach()), ref.name
    assert {ref.name for ref in refs if isinstance(ref, Stored)} == {"rows", "scalar", "empty"}


@pytest.mark.parametrize("is_zip", FORMATS)
def test_nested_dictionaries_and_plain_values(tmp_path: Path, is_zip: bool) -> None:
    value = {"epoch": 3, "model": {"a": torch.ones(2), "version": "1.0", "n": None}, "optimizer": {"lr": [0.1]}}
    refs, notes = read_pickle(save(tmp_path / "a.bin", value, is_zip))
    assert [ref.name for ref in refs] == ["a"]
    assert "left out epoch, optimizer" in notes[0]
    assert "left out version, n: plain values" in notes[1]


def test_a_tensor_may_be_named_model(tmp_path: Path) -> None:
    refs, _ = read_pickle(save(tmp_path / "a.bin", {"model": torch.ones(2), "x": torch.ones(1)}))
    assert [ref.name for ref in refs] == ["model", "x"]


# --- what is not weights -----------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", FORMATS)
def test_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "a.bin", {"a": torch.ones(2), "b": Evil(tmp_path / "run")}, is_zip)
    message = refused(path)
    assert "contains code (posix.mkdir)" in message or "contains code (nt.mkdir)" in message
    assert "not loaded" in message
    assert not (tmp_path / "run").exists()


def raw(path: Path, data: bytes, **records: bytes) -> Path:
    """A zip as torch.save writes it, with this data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in records.items():
            archive.writestr(f"a/{name.replace('__', '/')}", content)
    return path


NESTED = b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."  # hashing it takes 2**60 steps
HOSTILE = {
    "os.system by GLOBAL": (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "contains code (os.system)"),
    "os.system by INST": (b"(X\x02\x00\x00\x00lsios\nsystem\n.", "contains code (os.system)"),
    "os.system by STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "contains code (os.system)"),
    "eval": (b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", "contains code (__builtin__.eval)"),
    "attribute chain": (b"\x80\x04\x8c\x05torch\x8c\x0aSize.mro.x\x93.", "contains code (torch.Size.mro.x)"),
    "torch.load inside": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "contains code (torch.storage._load"),
    "an instance": (b"\x80\x02ctorch\nSize\n)\x81.", "an opcode that weights do not need"),
    "the copyreg registry": (b"\x80\x02\x82\x01.", "an opcode that weights do not need"),
    "attributes of a function": (b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.", "attributes for a function"),
    "a tuple as key": (NESTED, "a dictionary with a tuple as key"),
    "a number of a million digits as key": (
        b"\x80\x02}\x8b\x00\x00\x06\x00" + b"\x01" * 393216 + b"K\x01s.",
        "more than 64 bits",
    ),
    "code of an endless name": (b"\x80\x02cos\n" + b"x" * 60_000 + b"\n.", "x... (60,000 characters)) where weights"),
    "half a surrogate pair": (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80K\x01s.", "is damaged (UnicodeEncodeError"),
    "a length of 4 GB": (b"\x80\x02X\xff\xff\xff\xffabc", "is damaged (EOFError"),
    "a huge memo index": (b"\x80\x02}r\xff\xff\xff\x7f.", "no tensors in it"),
    "no STOP": (b"\x80\x02}", "is damaged"),
    "an empty stack": (b"\x80\x02.", "is damaged"),
    "a line without end": (b"\x80\x02cabc", "is damaged (EOFError"),
    "a list": (b"\x80\x02].", "holds a list, expected a dictionary of tensors"),
    "an empty dictionary": (b"\x80\x02}.", "has no tensors in it"),
    "a dictionary of lists": (b"\x80\x02}X\x01\x00\x00\x00a]s.", "'a': expected a tensor, found a list"),
    "itself inside itself": (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", "expected a tensor, found a dict"),
    "complex numbers": (
        b"\x80\x02ctorch\nComplexFloatStorage\n.",
        "type torch.ComplexFloatStorage, which are not read",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path: Path, case: str) -> None:
    data, phrase = HOSTILE[case]
    assert phrase in refused(raw(tmp_path / "a.bin", data))


PAIRS = b"](" + b"X\x01\x00\x00\x00aK\x01\x86" * 1000 + b"eq\x000"  # a list of 1,000 pairs, kept in the memo
MADE = b"ccollections\nOrderedDict\nq\x010(" + b"h\x01h\x00\x85R" * 100 + b"l."  # a dictionary of it, 100 times


@pytest.mark.parametrize("pickled", [b"\x80\x02(" + b"}" * 100_000 + b"l.", b"\x80\x02" + PAIRS + MADE])
def test_a_pickle_has_so_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bytes) -> None:
    """30 million empty dictionaries took 15 s and 2.1 GB."""
    assert MAX_INSTRUCTIONS == 4_000_000
    monkeypatch.setattr("merge.checkpoint.unpickler.MAX_INSTRUCTIONS", 40_000)
    assert "its pickle has more than 40,000 instructions; not loaded" in refused(raw(tmp_path / "a.bin", pickled))


class Pickler(pickle.Pickler):
    """Writes tensors that lie about their storage."""

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", obj.location, obj.numel) if isinstance(obj, Fake) else None


class Fake:
    def __init__(self, numel: Any, location: str = "cpu") -> None:
        self.numel, self.location = numel, location


class Rebuild:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def shared_tuple() -> Any:
    """Of 2^45 parts, in a few hundred bytes of pickle: its repr() never ends."""
    nested: Any = ()
    for _ in range(45):
        nested = (nested, nested)
    return nested


@pytest.mark.parametrize(
    ("fake", "first", "shape", "strides", "phrase"),
    [
        (Fake(4), 0, (5,), (1,), "go beyond its storage (20 bytes of 16)"),
        (Fake(4), 2, (2, 2), (2, 1), "go beyond its storage"),
        (Fake(4), -1, (2,), (1,), "expected integers"),
        (Fake(4), 0, (2,), (-1,), "expected integers"),
        (Fake(4), 0, (2,), (1, 1), "expected integers"),
        (Fake(4), 0, (2.0,), (1,), "expected integers"),
        (Fake(4), 0, (2**62, 4), (0, 0), "overflows"),
        (Fake(4), 0, (0, 2**62), (1, 1), "w: shape [0, 4611686018427387904] of F32 overflows"),
        (Fake(4), 0, (2**40,), (0,), "repeats its storage to 4,398,046,511,104 bytes, and the file has"),
        (Fake(4), 0, (1,) * 65, (1,) * 65, "expected integers"),
        (Fake(4), 0, (10**5000,), (1,), "shape (a number of 16,610 bits,)"),
        (Fake(10**5000), 0, (4,), (1,), "without a type, name or length"),
        (
            Fake(4),
            0,
            shared_tuple(),
            (1,),
            "shape ((((...), (...)), ((...), (...))), (((...), (...)), ((...), (...))))",
        ),
        (Fake(5), 0, (5,), (1,), "expected 20 bytes, found 16"),
        (Fake("4"), 0, (5,), (1,), "without a type, name or length"),
        (Fake(4, "meta"), 0, (4,), (1,), "meta device"),
    ],
)
def test_a_tensor_that_lies_about_its_storage(
    tmp_path: Path, fake: Fake, first: Any, shape: Any, strides: Any, phrase: str
) -> None:
    data = io.BytesIO()
    Pickler(data, protocol=2).dump({"w": Rebuild(fake, first, shape, strides, False, OrderedDict())})
    assert phrase in refused(raw(tmp_path / "a.bin", data.getvalue(), data__0=bytes(16)))


def test_a_zip_of_very_many_records_is_not_listed(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.bin", b"\x80\x02}.")
    data = Path(path).read_bytes()
    record = data[data.index(b"PK\x01\x02") : data.index(b"PK\x05\x06")]
    begin, n = data.index(b"PK\x01\x02"), 2**24 // len(record) + 1
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, n & 0xFFFF, n & 0xFFFF, n * len(record), begin, 0)
    path.write_bytes(data[:begin] + record * n + end)
    assert "its list of records has 16,777,2" in refused(path)


# --- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", FORMATS)
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "a.bin", {"a": torch.ones(40), "b": torch.ones(30)}, is_zip)
    size = os.path.getsize(path)
    for length in range(0, size, max(1, size // 50)):
        os.truncate(path, size)
        save(tmp_path / "a.bin", {"a": torch.ones(40), "b": torch.ones(30)}, is_zip)
        os.truncate(path, length)
        refused(path)
    save(tmp_path / "a.bin", {"a": torch.ones(40)}, is_zip)
    os.truncate(path, os.path.getsize(path) - 1)
    assert "truncated" in refused(path)


@pytest.mark.parametrize("is_zip", FORMATS)
def test_damaged_bytes_never_crash(tmp_path: Path, is_zip: bool) -> None:
    whole = Path(save(tmp_path / "a.bin", {"a": torch.ones(3), "b": torch.ones(2, 2).t()}, is_zip)).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "b.bin"
    for _ in range(300):
        damaged = bytearray(whole)
        place = int(random.integers(len(whole)))
        damaged[place : place + int(random.integers(3))] = random.integers(
            0, 256, random.integers(3), np.uint8
        ).tobytes()
        path.write_bytes(damaged)
        try:
            refs, _ = read_pickle(str(path))
        except CheckpointError:
            continue
        stored = [ref if isinstance(ref, Stored) else ref.inputs[0] for ref in refs]
        assert all(isinstance(ref, Stored) and 0 <= ref.offset <= len(damaged) for ref in stored)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}." + bytes(100))
    assert "a/data.pkl is compressed" in refused(tmp_path / "a.bin")


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    assert "byte order big; expected little" in refused(raw(tmp_path / "a.bin", b"\x80\x02}.", byteorder=b"big"))
    path = tmp_path / "legacy.bin"
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False})
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    assert "byte order big; expected little" in refused(path)


def test_a_large_pickle_is_not_read(tmp_path: Path) -> None:
    assert "data.pkl has 33,554,433 bytes" in refused(raw(tmp_path / "a.bin", bytes(32 * 2**20 + 1)))


def test_what_is_not_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content, phrase in (
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.example\n", "git lfs pull"),
        (struct.pack("<Q", 2) + b"{}", "is not a torch checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "wrong magic number"),
    ):
        path.write_bytes(content)
        assert phrase in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "")
    assert "no data.pkl" in refused(path)


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.bin", b"\x80\x02}.", **{"constants.pkl": b""})
    assert "TorchScript program" in refused(path)


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin", torch.nn.Linear(2, 2))
    assert "contains code (torch.nn.modules.linear.Linear)" in refused(path)
