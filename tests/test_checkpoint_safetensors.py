"""Safetensors headers: what is read is right, and each thing that can be wrong is said."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoint.plain_header import plain_header
from merge.checkpoint.safetensors_file import read_header
from merge.dtypes import DTYPES
from merge.errors import CheckpointError
from merge.plan import Stored


def write(path: Path, header: Any, data: bytes = b"") -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_golden_bytes(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I16","shape":[2,1],"data_offsets":[0,4]}}'
    path = write(tmp_path / "a.safetensors", header, b"\x01\x00\x02\x00")
    refs, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    (ref,) = refs
    assert (ref.file, ref.name, ref.dtype, ref.shape, isinstance(ref, Stored)) == (path, "a", "I16", (2, 1), True)
    assert Path(path).read_bytes()[ref.offset :] == b"\x01\x00\x02\x00"


def test_round_trip_with_the_safetensors_library(tmp_path: Path) -> None:
    names = [dtype.torch_name for dtype in DTYPES.values()]
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "umlaut ü": torch.ones(1)}
    path = str(tmp_path / "all.safetensors")
    save_file(tensors, path, metadata={"who": "me"})
    refs, metadata = read_header(path)
    assert metadata == {"who": "me"}
    assert {ref.name for ref in refs} == set(tensors)
    data = Path(path).read_bytes()
    for ref in refs:
        tensor = tensors[ref.name]
        assert ref.shape == tuple(tensor.shape)
        raw = (
            tensor.flatten().view(torch.uint8)
            if tensor.numel() and tensor.dim()
            else tensor.reshape(-1).view(torch.uint8)
        )
        assert data[ref.offset : ref.offset + ref.nbytes] == raw.numpy().tobytes()
    assert [ref.offset for ref in refs] == sorted(ref.offset for ref in refs)


def test_no_tensors_and_only_empty_tensors_are_fine(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "none.safetensors", {})) == ([], {})
    refs, _ = read_header(write(tmp_path / "zero.safetensors", {"a": entry(shape=[0, 3], offsets=[0, 0])}))
    assert refs[0].size == 0


TWO = {"a": entry(), "b": entry(offsets=[8, 16])}
MALFORMED: dict[str, tuple[Any, bytes, tuple[str, ...]]] = {
    "not utf-8": (b'{"\xff\xfe":1}', b"", ("not UTF-8", "Download the file again")),
    "not json": (b"{nonsense", b"", ("not valid JSON", "Download the file again")),
    "nested without end": (b"[" * 100_000, b"", ("not valid JSON",)),
    "half a surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", ("not valid JSON",)),
    "a list": (b"[]", b"", ("JSON list", "expected an object")),
    "leading space": (b" {}", b"", ("begins with ' '", 'expected "{"')),
    "duplicate tensors": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        ("duplicate", '"a"', "twice"),
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", ("__metadata__", "strings")),
    "tensor is not an object": ({"a": 3}, b"", ("a: expected an object", "found 3")),
    "unknown dtype": ({"a": entry("F99")}, bytes(8), ("a: unknown dtype 'F99'", "Known: F64, F32, F16, BF16")),
    "missing dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), ("unknown dtype None",)),
    "F4": ({"a": entry("F4", [16])}, bytes(8), ("dtype F4 packs several values", "Dequantise")),
    "F6": ({"a": entry("F6_E2M3", [8], [0, 6])}, bytes(6), ("dtype F6_E2M3 packs several values",)),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8), ("a: shape", "[-2]")),
    "size true": ({"a": entry(shape=[True, 2])}, bytes(8), ("a: shape", "True")),
    "size 2.0": ({"a": entry(shape=[2.0])}, bytes(8), ("a: shape", "2.0")),
    "shape is not a list": (
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        bytes(8),
        ("a: shape", "found 2"),
    ),
    "shape overflows": ({"a": entry(shape=[2**40, 2**40])}, bytes(8), ("a: shape", "overflows")),
    "size overflows": ({"a": entry(shape=[2**70])}, bytes(8), ("a: shape", "overflows")),
    "three hundred sizes": ({"a": entry(shape=[2**62] * 300)}, bytes(8), ("a: shape [4611", "...", "overflows")),
    "a row of no rows": ({"a": entry(shape=[0, 2**62], offsets=[0, 0])}, b"", ("a: shape [0, 4611", "overflows")),
    "an endless name": (
        {"x" * 70_000: entry()},
        bytes(8),
        ("at most 8,192 characters, found xxx", "(70,000 characters)"),
    ),
    "a size of 5,000 digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        bytes(8),
        ("header holds a number of 5,000 digits",),
    ),
    "three million lists": (b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", b"", ("take about 477 MiB of memory",)),
    "megabytes for offsets": ({"a": entry(offsets=[0] * 10**6)}, bytes(8), ("two integers, found [0, 0", "...")),
    "one offset": ({"a": entry(offsets=[0])}, bytes(8), ("a: data_offsets", "two integers", "[0]")),
    "offsets of text": ({"a": entry(offsets=["0", "8"])}, bytes(8), ("a: data_offsets", "two integers")),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, bytes(8), ("a: data_offsets", "negative")),
    "offset too large": ({"a": entry(offsets=[2**64, 2**64 + 8])}, bytes(8), ("a: data_offsets", "too large")),
    "decreasing offsets": ({"a": entry(offsets=[8, 0])}, bytes(8), ("a: data_offsets decrease from 8 to 0",)),
    "truncated": (TWO, bytes(13), ("b:", "truncated, 3 bytes are missing", "expected 16", "found 13", "Download")),
    "size mismatch": ({"a": entry(shape=[3])}, bytes(8), ("a: F32 [3]: expected 12 bytes, found 8",)),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), ("b: overlaps a by 4 bytes",)),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), ("b: a hole of 4 bytes between a and",)),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), ("a: a hole of 4 bytes between the header",)),
    "trailing bytes": (TWO, bytes(21), ("5 trailing bytes after the last tensor, b",)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_named(tmp_path: Path, case: str) -> None:
    header, data, phrases = MALFORMED[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for phrase in phrases:
        assert phrase in message


A, B = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', '"b":{"data_offsets":[1,2],"shape":[],"dtype":"U8"}'
SOUND = {
    "plain": (f"{{{A},{B}}}", True),
    "the last first": (f"{{{B},{A}}}", True),
    "padded": (f"{{{A},{B}}}    ", True),
    "with metadata": (f'{{"__metadata__":{{"format":"pt","dtype":"x"}},{A},{B}}}', True),
    "metadata last": (f'{{{A},{B},"__metadata__":{{}}}}', True),
    "an escaped name": (f"{{{A},{B}}}".replace('"b"', '"\\u0062"'), False),
    "a key that nobody reads": (f'{{{A},{B[:-1]},"more":[]}}}}', False),
}


@pytest.mark.parametrize("case", SOUND)
def test_headers_decoded_at_once_read_as_those_that_are_looked_at(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, is_plain = SOUND[case]
    path = write(tmp_path / "a.safetensors", text.encode(), bytes(2))
    start = 8 + len(text)
    found = plain_header(text, path, start, 2)
    monkeypatch.setattr("merge.checkpoint.safetensors_file.plain_header", lambda *_: None)
    strict = read_header(path)
    assert [ref.name for ref in strict[0]] == ["a", "b"]
    assert found == (strict if is_plain else None)


@pytest.mark.parametrize("case", MALFORMED)
def test_nothing_malformed_is_decoded_at_once(case: str) -> None:
    header, data, _ = MALFORMED[case]
    text = header.decode("utf-8", "replace") if isinstance(header, bytes) else json.dumps(header)
    assert plain_header(text, "a.safetensors", 8 + len(text), len(data)) is None


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\x01\x02\x03", "only 3 bytes long"),
        (struct.pack("<Q", 1000) + b"{}", "header length 1,000 goes beyond the file, which has 10 bytes"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04" + bytes(60), "torch pickle with the wrong name"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, phrase: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(str(path))
    assert phrase in str(caught.value)


def test_a_header_over_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match="header length 100,000,001 is more than the allowed 100,000,000"):
        read_header(str(path))


def test_a_pipe_or_directory_or_missing_file_does_not_hang(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(str(tmp_path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(str(tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(str(tmp_path / "absent"))


def test_thousands_of_tensors_are_read_in_a_moment(tmp_path: Path) -> None:
    header = {
        f"model.layers.{i}.self_attn.q_proj.weight": entry("BF16", [4, 4], [32 * i, 32 * i + 32]) for i in range(3000)
    }
    path = write(tmp_path / "many.safetensors", header)
    os.truncate(path, os.path.getsize(path) + 32 * 3000)
    begin = time.process_time()
    refs, _ = read_header(path)
    assert len(refs) == 3000
    assert time.process_time() - begin < 1  # about 0.03 s of the processor's time, however busy it is
