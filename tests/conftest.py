"""Nothing here reaches the network; models are a few kilobytes, made on the spot."""

from __future__ import annotations

import os

os.environ.update(
    {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Workers of pytest-xdist share the cores. Libraries read these on import, here and in processes that tests start.
    | dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        if "TEST_THREADS" in os.environ or "PYTEST_XDIST_WORKER" in os.environ
        else (),
        os.environ.get("TEST_THREADS", "1"),
    )
)

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from safetensors import TensorSpec, serialize_file

settings.register_profile("any machine", deadline=None)  # a busy one takes 300 ms for what takes 2
settings.load_profile("any machine")

# Code that models bring is copied there on loading, and imported from there: one place for all tests of a process.
_CODE = tempfile.TemporaryDirectory(prefix="merge-tests-")
os.environ["HF_MODULES_CACHE"] = _CODE.name
# What is shown depends on no terminal; each test that is about one sets these.
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(name, None)
# A shell starts background jobs with SIGINT ignored, and all their processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 32
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Output(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Output]:
    """run_cli(["run", "recipe.yaml"], cwd=..., env=...) -> (code, stdout, stderr) of the command, in a new process."""

    def run(
        args: Sequence[str | os.PathLike[str]], cwd: Path = tmp_path, env: Mapping[str, str] | None = None
    ) -> Output:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "merge", *map(os.fspath, args)],
            cwd=cwd,
            env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUTF8": "1"} | dict(env or {}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        return Output(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(params=["here", pytest.param("process", marks=pytest.mark.full)])
def call_cli(
    request: pytest.FixtureRequest, run_cli: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Output]:
    """run_cli, but in this process, which has imported the libraries: seconds less each. make test-full does both."""

    def call(
        args: Sequence[str | os.PathLike[str]], cwd: Path = tmp_path, env: Mapping[str, str] | None = None
    ) -> Output:
        from merge.cli import main

        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["merge", *map(os.fspath, args)])
            for name, value in ({"COLUMNS": "200", "NO_COLOR": "1"} | dict(env or {})).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main()
        return Output(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return run_cli if request.param == "process" else call


@pytest.fixture
def make_model() -> Callable[..., Path]:
    """Writes a small Llama checkpoint and returns its directory; see `write` below for what can be asked for."""
    made: dict[Path, dict[str, np.ndarray]] = {}

    def write(
        path: str | os.PathLike[str],
        *,
        seed: int = 0,
        layers: int = 2,
        hidden: int = 16,
        dtype: str = "F32",
        base: str | os.PathLike[str] | None = None,
        delta: float = 0.0,
        shards: int = 1,
        tied: bool = False,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> Path:
        """A checkpoint of normal numbers, or base + delta * normal numbers.

        Args:
            seed: of the numbers.
            hidden: width; a multiple of 4.
            dtype: F64, F32, F16 or BF16; the numbers are drawn in float32 and rounded to it.
            base: a directory that this fixture made, with the same layers, hidden and tied.
            delta: standard deviation of the task vector; that of the base's weights is 0.05.
            shards: number of weight files; more than one come with an index.
            tied: no head of its own.
            extra: more tensors, or others in place of those of that name, written in their own dtype.
        """
        path = Path(path)
        random = np.random.default_rng(seed)
        start = made[Path(base)] if base is not None else None
        tensors: dict[str, np.ndarray] = {}
        for name, shape in llama_shapes(layers, hidden, tied).items():
            noise = random.standard_normal(shape, dtype=np.float32)
            if start is not None:
                tensors[name] = start[name] + np.float32(delta) * noise
            else:
                tensors[name] = (1 if name.endswith("norm.weight") else 0) + np.float32(0.05) * noise
        made[path] = tensors
        stored = {name: (encode(values, dtype), NAMES[dtype]) for name, values in tensors.items()}
        stored |= {name: (values, values.dtype.name) for name, values in (extra or {}).items()}
        path.mkdir(parents=True, exist_ok=True)
        write_weights(path, stored, shards)
        write_json(path / "config.json", llama_config(layers, hidden, tied, NAMES[dtype]))
        write_json(path / "tokenizer.json", TOKENIZER)
        write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
        return path

    return write


def llama_shapes(layers: int, hidden: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with 2 heads, 1 KV head and an intermediate size of 2 * hidden."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        parts = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (2 * hidden, hidden),
            "mlp.up_proj": (2 * hidden, hidden),
            "mlp.down_proj": (hidden, 2 * hidden),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (VOCABULARY, hidden)}


def llama_config(layers: int, hidden: int, tied: bool, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "WordLevel",
        "vocab": {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)},
        "unk_token": "<unk>",
    },
}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> the dtype, to nearest even; bfloat16 as its bits, since numpy has none."""
    if dtype != "BF16":
        return values.astype(NAMES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_weights(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]], shards: int) -> None:
    """(values, safetensors' name of the dtype) by tensor -> one or more files."""
    names = list(tensors)
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        write_safetensors(path / file, {name: tensors[name] for name in part})
        placed |= dict.fromkeys(part, file)
    total = sum(values.nbytes for values, _ in tensors.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def write_safetensors(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    kept = {name: np.asarray(values, order="C") for name, (values, _) in tensors.items()}  # alive until written
    specs = {
        name: TensorSpec(
            dtype=tensors[name][1], shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes
        )
        for name, values in kept.items()
    }
    serialize_file(specs, path, {"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Files of few tests that take long: they begin first, so that no worker is left alone with one at the end.
_LONG = (
    *(
        "test_finetune_strategies",
        "test_eval_soup",
        "test_eval_cache",
        "test_eval_run",
        "test_kill",
        "test_kill_points",
    ),
    *("test_finetune_processes", "test_fuzz", "test_finetune_cli", "test_generate_talk", "test_layerwise"),
    *("test_rebuild", "test_bad_inputs", "test_finetune_train", "test_finetune_resume", "test_pipelines"),
    *("test_pipelines_again", "test_methods_common", "test_architectures", "test_lora_extract", "test_user_methods"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))
