"""SourceReader: exact numbers, bounded reads, and files that must not change."""

from __future__ import annotations

import dataclasses
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge.checkpoint.reader import SourceReader
from merge.checkpoint.safetensors_file import read_header
from merge.decode import to_float32
from merge.dtypes import DTYPES
from merge.errors import CheckpointError, SourceChanged
from merge.plan import SourceFile, Stored
from merge.sources.view import boxes, read_strided


def source(path: Path | str) -> SourceFile:
    return SourceFile.now(path)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SourceFile, Stored, np.ndarray]:
    """A file with one F32 tensor of 10,000 elements, and its numbers."""
    path = tmp_path / "a.safetensors"
    values = torch.randn(100, 100)
    save_file({"w": values}, str(path))
    return source(path), read_header(str(path))[0][0], values.numpy().reshape(-1)


# --- decoding ----------------------------------------------------------------------------------------------------


def same(found: np.ndarray, expected: torch.Tensor) -> None:
    """Equal bit by bit, but that any NaN is as good as another."""
    wanted = expected.numpy()
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.array_equal(found.view(np.uint32)[~np.isnan(found)], wanted.view(np.uint32)[~np.isnan(wanted)])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_every_code_of_a_small_float_is_decoded_as_torch_does(dtype: str) -> None:
    storage = np.uint8 if DTYPES[dtype].itemsize == 1 else np.uint16
    codes = np.arange(256 ** DTYPES[dtype].itemsize, dtype=np.int64).astype(storage)
    out = np.empty(len(codes), np.float32)
    to_float32(dtype, codes.view(DTYPES[dtype].numpy_name), out)
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
    same(out, torch.from_numpy(codes.view(np.int8 if storage is np.uint8 else np.int16)).view(torch_dtype).float())


def test_fp8_by_hand() -> None:
    out = np.empty(6, np.float32)
    to_float32("F8_E4M3", np.array([0x00, 0x80, 0x01, 0x38, 0x7E, 0x7F], np.uint8), out)
    assert str(out.tolist()) == "[0.0, -0.0, 0.001953125, 1.0, 448.0, nan]"
    to_float32("F8_E5M2", np.array([0x01, 0x3C, 0x7B, 0x7C, 0xFC, 0x7D], np.uint8), out)
    assert str(out.tolist()) == "[1.52587890625e-05, 1.0, 57344.0, inf, -inf, nan]"


def test_float32_is_copied_and_other_dtypes_are_for_the_caller() -> None:
    out = np.empty(2, np.float32)
    to_float32("F32", np.array([1.5, np.inf], np.float32), out)
    assert out.tolist() == [1.5, np.inf]
    for dtype in ("F64", "I32"):
        with pytest.raises(ValueError, match="not held exactly"):
            to_float32(dtype, np.zeros(2, DTYPES[dtype].numpy_name), out)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["preadv", "pread", "seek"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways of reading of Linux, of older macOS and of Windows."""
    for name in {"preadv": (), "pread": ("preadv",), "seek": ("preadv", "pread", "posix_fadvise")}[request.param]:
        monkeypatch.delattr(os, name, raising=False)
    return str(request.param)


@pytest.mark.usefixtures("system")
def test_any_range_of_elements(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, values = stored
    with SourceReader([file]) as reader:
        for start, count in ((0, 10_000), (1, 1), (9_999, 1), (123, 4_567), (50, 0)):
            out = np.empty(count, np.float32)
            reader.will_need(ref, start, count)
            reader.read_into(ref, start, out)
            assert np.array_equal(out, values[start : start + count])


@pytest.mark.usefixtures("system")
def test_many_threads_read_at_once(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, values = stored
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(100):
            start, count = random.integers(9_000), random.integers(1_000)
            out = np.empty(count, np.float32)
            reader.read_into(ref, int(start), out)
            if not np.array_equal(out, values[start : start + count]):
                wrong.append(start)

    with SourceReader([file]) as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reader._descriptors) == 1
    assert wrong == []


def test_integers_are_read_as_they_are_stored_never_as_floats(
    stored: tuple[SourceFile, Stored, np.ndarray],
) -> None:
    file, ref, values = stored
    integers, out = dataclasses.replace(ref, dtype="I32"), np.empty(70, np.int32)
    with SourceReader([file]) as reader:
        reader.read_values(integers, 5, out)
        assert np.array_equal(out, values[5:75].view(np.int32))
        with pytest.raises(ValueError, match="I32 is not held exactly by float32"):
            reader.read_values(integers, 5, np.empty(70, np.float32))


def test_short_reads_are_continued(
    stored: tuple[SourceFile, Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ref, values = stored
    pread = os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: views[0].__setitem__(slice(7), pread(fd, 7, at)) or 7)
    out = np.empty(70, np.float32)  # 280 bytes: a whole number of reads
    with SourceReader([file]) as reader:
        reader.read_into(ref, 5, out)
    assert np.array_equal(out, values[5:75])


def test_ranges_and_buffers_that_do_not_fit_are_refused(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, _ = stored
    with SourceReader([file]) as reader:
        for start, out in (
            (9_999, np.empty(2, np.float32)),
            (-1, np.empty(2, np.float32)),
            (0, np.empty(2, np.float16)),
            (0, np.empty((2, 2), np.float32)),
            (0, np.empty(4, np.float32)[::2]),
        ):
            with pytest.raises(ValueError, match=r"elements|contiguous"):
                reader.read_into(ref, start, out)
        with pytest.raises(ValueError, match="not a file of this plan"):
            reader.read_into(replace(ref, file="other"), 0, np.empty(1, np.float32))
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(ref, 0, np.empty(1, np.float32))


# --- files that change -------------------------------------------------------------------------------------------


def test_a_file_that_changed_before_it_was_opened(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, _ = stored
    os.utime(file.path, ns=(0, file.mtime_ns + 1_000_000_000))
    with SourceReader([file]) as reader:
        with pytest.raises(SourceChanged, match=r"a.safetensors: was written again .*\+1.000 s"):
            reader.read_into(ref, 0, np.empty(1, np.float32))
        with pytest.raises(SourceChanged, match="was written again"):
            reader.check_unchanged()


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_file_whose_size_and_mtime_are_kept(
    stored: tuple[SourceFile, Stored, np.ndarray], how: str, opened: bool
) -> None:
    file, ref, _ = stored
    path = Path(file.path)
    with SourceReader([file]) as reader:
        if opened:
            reader.read_into(ref, 0, np.empty(1, np.float32))
        other = path.read_bytes()[:-1] + b"\x01"
        if how == "replaced":
            (path.parent / "new").write_bytes(other)
            os.utime(path.parent / "new", ns=(0, file.mtime_ns))
            os.replace(path.parent / "new", path)
        else:
            path.write_bytes(other)
            os.utime(path, ns=(0, file.mtime_ns))
        info = path.stat()
        assert (info.st_size, info.st_mtime_ns) == (file.size, file.mtime_ns)
        if not opened:
            with pytest.raises(SourceChanged, match=r"a.safetensors: was replaced or written to since"):
                reader.read_into(ref, 0, np.empty(1, np.float32))
        with pytest.raises(SourceChanged, match=r"a.safetensors: was replaced or written to since"):
            reader.check_unchanged()


def test_a_file_that_is_cut_short_while_it_is_read(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, _ = stored
    with SourceReader([file]) as reader:
        reader.check_unchanged(file.path)
        reader.read_into(ref, 0, np.empty(1, np.float32))
        os.truncate(file.path, file.size - 100)
        with pytest.raises(SourceChanged, match=f"expected {file.size:,} bytes, found {file.size - 100:,}"):
            reader.read_into(ref, 0, np.empty(10_000, np.float32))


def test_a_file_that_is_replaced_or_removed(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, _ = stored
    with SourceReader([file]) as reader:
        reader.read_into(ref, 0, np.empty(1, np.float32))
        os.unlink(file.path)
        with pytest.raises(SourceChanged, match="is gone"):
            reader.check_unchanged()
        save_file({"w": torch.zeros(3)}, file.path)
        with pytest.raises(SourceChanged, match="changed since the run was planned"):
            reader.check_unchanged()
    os.unlink(file.path)
    with SourceReader([file]) as reader, pytest.raises(SourceChanged, match="is gone"):
        reader.read_into(ref, 0, np.empty(1, np.float32))


def test_a_failing_disk_names_file_tensor_and_place(
    stored: tuple[SourceFile, Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ref, _ = stored

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with (
        SourceReader([file]) as reader,
        pytest.raises(CheckpointError, match=r"w: cannot be read at byte .*Input/output"),
    ):
        reader.read_into(ref, 0, np.empty(1, np.float32))


def test_a_tensor_beyond_the_end_of_an_unchanged_file(stored: tuple[SourceFile, Stored, np.ndarray]) -> None:
    file, ref, _ = stored
    with SourceReader([file]) as reader, pytest.raises(CheckpointError, match="w: the file ends at byte"):
        reader.read_into(replace(ref, offset=file.size - 4), 0, np.empty(2, np.float32))


@pytest.mark.skipif(os.name == "nt", reason="no limit to lower on Windows")
def test_more_files_than_the_soft_limit_allows(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refs = []
    for i in range(60):
        save_file({"w": torch.full((1,), float(i))}, str(tmp_path / f"{i}.safetensors"))
        refs += read_header(str(tmp_path / f"{i}.safetensors"))[0]
    highest = os.open(tmp_path, os.O_RDONLY)
    os.close(highest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
        with SourceReader([source(ref.file) for ref in refs]) as reader:
            out = np.empty(1, np.float32)
            for i, ref in enumerate(refs):
                reader.read_into(ref, 0, out)
                assert out[0] == i
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- views that are not contiguous -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_cover_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    index = np.arange(int(np.prod(shape))).reshape(shape)
    start = data.draw(st.integers(0, index.size))
    stop = data.draw(st.integers(start, index.size))
    parts = [
        index[tuple(slice(i, i + n) for i, n in zip(first, sizes, strict=True))].reshape(-1)
        for first, sizes in boxes(tuple(shape), start, stop)
    ]
    assert np.array_equal(np.concatenate(parts) if parts else np.empty(0), np.arange(start, stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@settings(deadline=None)
@given(st.integers(0, 2**16), st.data())
def test_strided_views_are_read_as_numpy_does(seed: int, data: st.DataObject) -> None:
    stored = np.random.default_rng(seed).integers(0, 1000, 300 * 200).astype(np.int32)
    view = stored.reshape(300, 20, 10).transpose(data.draw(st.permutations(range(3))))[
        :, :: data.draw(st.integers(1, 3))
    ]
    flat = view.reshape(-1)
    start = data.draw(st.integers(0, len(flat) - 1))
    out = np.empty(data.draw(st.integers(0, min(5000, len(flat) - start))), np.int32)
    strides = tuple(step // 4 for step in view.strides)
    largest = 0

    def fill(first: int, part: np.ndarray) -> None:
        nonlocal largest
        largest = max(largest, part.nbytes)
        part[:] = stored[first : first + len(part)]

    read_strided(view.shape, strides, start, out, fill)
    assert np.array_equal(out, flat[start : start + len(out)])
    assert largest <= 1 << 20
