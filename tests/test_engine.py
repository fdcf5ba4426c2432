"""The engine's promises: the same bytes on any threads, blocks and shards; resume; what is written is true."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, write_json, write_safetensors
from safetensors.numpy import load_file

import merge.output.writer
from merge import build_plan, parse_recipe, run_plan, verify_output
from merge.engine.crew import Crew, Stopped
from merge.errors import MergeError, NumbersError, OutputError, SourceChanged, UsageError
from merge.plan import Plan

WEIGHTED = """
merge_method: {method}
base_model: {root}/base
models:
  - model: {root}/a
    parameters: {{weight: 0.7, density: [0.2, 0.9]}}
  - model: {root}/b
    parameters: {{weight: -0.4, density: 0.6}}
parameters: {{normalize: false, lambda: 0.9}}
seed: 3
"""
METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


@pytest.fixture
def family(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """base, a, b in bfloat16, wide enough that a matrix has several chunks."""
    make_model(tmp_path / "base", hidden=512, dtype="BF16")
    for seed, name in enumerate("ab", 1):
        make_model(
            tmp_path / name, hidden=512, dtype="BF16", base=tmp_path / "base", delta=0.002, seed=seed, shards=seed
        )
    return tmp_path


def plan_of(root: Path, text: str, shard_bytes: int = 10**9) -> Plan:
    return build_plan(parse_recipe(text.format(root=root, method="{method}")), shard_bytes=shard_bytes)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_blocks_do_not_change_a_byte(family: Path, method: str) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method=method)))
    results = []
    for threads, blocks, ram in ((1, 1, None), (2, 1, None), (4, 3, None), (2, 100, 200 << 20)):
        out = family / f"out-{threads}-{blocks}"
        run_plan(plan, out, threads=threads, block_chunks=blocks, max_ram=ram)
        results.append(contents(out))
    assert all(result == results[0] for result in results[1:])


def test_how_sources_are_cut_into_shards_does_not_change_a_tensor(
    family: Path, make_model: Callable[..., Path]
) -> None:
    text = WEIGHTED.format(root=family, method="ties")
    run_plan(build_plan(parse_recipe(text)), family / "one")
    make_model(family / "a", hidden=512, dtype="BF16", base=family / "base", delta=0.002, seed=1, shards=5)
    (family / "a" / "model.safetensors").unlink()
    run_plan(build_plan(parse_recipe(text), shard_bytes=1_500_000), family / "many")
    many = [path.name for path in sorted((family / "many").glob("*.safetensors"))]
    assert many[0] == f"model-00001-of-{len(many):05d}.safetensors"
    tensors = [json.loads((family / out / "merge_manifest.json").read_text())["tensors"] for out in ("one", "many")]
    digests = [{name: tensor["digest"] for name, tensor in found.items()} for found in tensors]
    assert digests[0] == digests[1]
    assert verify_output(family / "many").problems == ()
    index = json.loads((family / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(digests[0])


def test_a_plan_survives_json(family: Path) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="ties")))
    assert Plan.from_json(plan.to_json()) == plan


def test_resume_takes_what_is_done_and_gives_the_same_bytes(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="dare_ties")))
    run_plan(plan, family / "whole")
    finish = merge.output.writer.OutputDirectory.finish
    finished = []

    def failing(self: object, index: int, record: dict[str, object]) -> None:
        if len(finished) == 7:
            raise OSError(28, "No space left on device")
        finished.append(index)
        finish(self, index, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(merge.output.writer.OutputDirectory, "finish", failing)
        with pytest.raises(OSError, match="No space"):
            run_plan(plan, family / "cut", threads=1)
    assert not (family / "cut").exists()
    assert (family / "cut.partial").is_dir()
    report = run_plan(plan, family / "cut")
    assert report.resumed_tensors == 7
    assert contents(family / "cut") == contents(family / "whole")


def test_resume_computes_again_what_was_damaged_meanwhile(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="ties")))
    run_plan(plan, family / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            merge.output.writer.OutputDirectory, "complete", lambda *args: (_ for _ in ()).throw(MergeError("stop"))
        )
        with pytest.raises(MergeError, match="stop"):
            run_plan(plan, family / "cut")
    step = plan.steps[4]
    with (family / "cut.partial" / "result" / step.file).open("r+b") as file:
        file.seek(step.offset + 3)
        file.write(b"\xff\xff")
    with (family / "cut.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"step": 1, "dig')  # a line that a kill cut short
    report = run_plan(plan, family / "cut")
    assert report.resumed_tensors == len(plan.steps) - 1
    assert contents(family / "cut") == contents(family / "whole")


def test_an_existing_result_is_kept_unless_forced(family: Path) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="ties")))
    out = family / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises(UsageError, match="exists; nothing was changed"):
        run_plan(plan, out)
    assert contents(out) == {"precious.txt": b"keep me"}
    run_plan(plan, out, force=True)
    assert not (out / "precious.txt").exists()
    assert sorted(path.name for path in family.iterdir()) == ["a", "b", "base", "out"]


def test_unfinished_work_of_another_plan_is_not_mixed_in(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (build_plan(parse_recipe(WEIGHTED.format(root=family, method=m))) for m in ("ties", "dare_ties"))
    with monkeypatch.context() as patch:
        patch.setattr(
            merge.output.writer.OutputDirectory, "complete", lambda *args: (_ for _ in ()).throw(MergeError("stop"))
        )
        with pytest.raises(MergeError, match="stop"):
            run_plan(first, family / "out")
    with pytest.raises(UsageError, match="unfinished work of another recipe"):
        run_plan(second, family / "out")
    with (
        pytest.raises(UsageError, match="other options"),
        merge.output.writer.OutputDirectory(first, family / "out", device="cuda"),
    ):
        pass
    assert run_plan(second, family / "out", force=True).resumed_tensors == 0


def test_the_second_of_two_runs_into_one_place_is_refused(family: Path) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="ties")))
    with (
        merge.output.writer.OutputDirectory(plan, family / "out"),
        pytest.raises(OutputError, match="being written by another run"),
    ):
        run_plan(plan, family / "out")


def test_a_source_that_changes_is_noticed(family: Path) -> None:
    plan = build_plan(parse_recipe(WEIGHTED.format(root=family, method="ties")))
    shard = family / "a" / "model.safetensors"
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(SourceChanged, match="was written again since"):
        run_plan(plan, family / "out")
    assert not (family / "out").exists()


def test_model_trim_keeps_the_share_over_the_whole_task_vector(family: Path) -> None:
    text = WEIGHTED.format(root=family, method="ties").replace("density: [0.2, 0.9]", "density: 0.3")
    text = text.replace("lambda: 0.9", "lambda: 1.0, trim: model").replace("-0.4", "0.0").replace("0.7", "1.0")
    results = []
    for threads in (1, 3):
        out = family / f"out{threads}"
        run_plan(build_plan(parse_recipe(text + "out_dtype: float32\n")), out, threads=threads)
        results.append(contents(out))
    assert results[0] == results[1]
    merged, base, model = (all_values(family / name) for name in ("out1", "base", "a"))
    delta = np.abs(model - base)
    kept = merged != base
    assert kept.sum() <= int(0.3 * delta.size)
    assert delta[kept].min() >= delta[~kept].max()  # the largest stay; equal ones may be on both sides
    assert kept.sum() == int(0.3 * delta.size) or delta[kept].min() == 0


def all_values(directory: Path) -> np.ndarray:
    """All numbers of a checkpoint in float32, by the name of tensors."""
    tensors: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= raw_tensors(path)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def raw_tensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(data[start:stop], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(
                    data[start:stop], {"F32": np.float32, "F16": np.float16, "F64": np.float64}[entry["dtype"]]
                )
            found[name] = values.reshape(entry["shape"])
    return found


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_input_dtype_is_read_exactly(tmp_path: Path, make_model: Callable[..., Path], dtype: str) -> None:
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, dtype=dtype, seed=seed)
    text = f"merge_method: linear\nmodels:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\nparameters: {{weight: 0.5}}\n"
    run_plan(build_plan(parse_recipe(text)), tmp_path / "same")
    out_dtype = "float64" if dtype == "F64" else "float32"
    run_plan(build_plan(parse_recipe(text + f"out_dtype: {out_dtype}\n")), tmp_path / "wide")
    a, b, wide, same = (raw_tensors(tmp_path / name / "model.safetensors") for name in ("a", "b", "wide", "same"))
    for name in a:
        mean = (a[name].astype(np.float64) + b[name].astype(np.float64)) / 2
        assert np.array_equal(wide[name], mean.astype(wide[name].dtype)), name
        expected = encode(wide[name].astype(np.float32), dtype) if dtype != "F64" else mean
        stored = encode(same[name].astype(np.float32), dtype) if dtype != "F64" else same[name]
        assert np.array_equal(stored, expected), name
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == out_dtype


def test_mixed_dtypes_merge_into_the_bases(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "base", dtype="BF16")
    make_model(tmp_path / "a", dtype="F32", base=tmp_path / "base", delta=0.01, seed=1)
    make_model(tmp_path / "b", dtype="F16", base=tmp_path / "base", delta=0.01, seed=2)
    plan = build_plan(parse_recipe(WEIGHTED.format(root=tmp_path, method="ties")))
    run_plan(plan, tmp_path / "out")
    assert {step.dtype for step in plan.steps} == {"BF16"}
    assert verify_output(tmp_path / "out").problems == ()


def test_copies_are_byte_for_byte_and_integers_must_agree(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    numbers = {"model.position_ids": np.arange(64, dtype=np.int64), "model.mask": np.array([True, False])}
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed, extra=numbers)
    text = f"merge_method: linear\nmodels:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\n"
    text += "parameters: {weight: 0.5}\ndtype: float16\n"
    run_plan(build_plan(parse_recipe(text)), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(merged["model.position_ids"], numbers["model.position_ids"])
    assert merged["model.mask"].dtype == np.bool_
    make_model(tmp_path / "b", seed=1, extra=numbers | {"model.mask": np.array([True, True])})
    with pytest.raises(NumbersError, match=r"model.mask \(BOOL\): .*/a and .*/b hold different values"):
        run_plan(build_plan(parse_recipe(text)), tmp_path / "out2")
    run_plan(build_plan(parse_recipe(text + "allow: [integer_mismatch]\n")), tmp_path / "out3")
    assert np.array_equal(load_file(tmp_path / "out3" / "model.safetensors")["model.mask"], numbers["model.mask"])


def test_fp8_with_block_scales_is_dequantised(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in "ab":
        make_model(tmp_path / name)
        tensors = {
            "w.weight": (codes, "float8_e4m3fn"),
            "w.weight_scale_inv": (np.array([[1.0, 2.0], [0.5, 4.0]], np.float32), "float32"),
        }
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
        write_json(tmp_path / name / "config.json", config)
    text = f"merge_method: linear\nmodels:\n- model: {tmp_path}/a\n- model: {tmp_path}/b\nparameters: {{weight: 0.5}}\n"
    run_plan(build_plan(parse_recipe(text)), tmp_path / "out")
    merged = raw_tensors(tmp_path / "out" / "model.safetensors")
    import torch

    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    scales = np.repeat(np.repeat([[1.0, 2.0], [0.5, 4.0]], 4, axis=0), 4, axis=1)
    assert np.array_equal(merged["w.weight"], (values * scales).astype(np.float32))
    assert list(merged) == ["w.weight"]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_crew_lends_idle_threads_and_passes_errors_on() -> None:
    crew = Crew(4)
    names: set[str] = set()
    gate = threading.Barrier(2, timeout=20)

    def step(item: int) -> None:
        def update(state: list[int], value: int) -> None:
            names.add(threading.current_thread().name)
            if value < 2:
                gate.wait()  # passes only if a second thread helps
            state.append(value)

        if item == 0:
            states = crew.fold(list, update, _slowly())
            assert sorted(value for state in states for value in state) == list(range(20))

    crew.each(step, [0], lambda: None)
    assert len(names) > 1
    with pytest.raises(ZeroDivisionError):
        crew.each(lambda item: print(1 / item), [1, 0, 1], lambda: None)
    assert not issubclass(Stopped, MergeError)


def _slowly() -> object:
    """Numbers that come late enough for the other threads to be idle by then."""
    import time

    time.sleep(0.3)
    yield from range(20)
