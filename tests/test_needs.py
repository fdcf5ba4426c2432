"""A package that a verb needs is asked for before any work, and before any heavy import, with the command for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.before import check_packages
from finetune.keys import Config, DataSource
from merge.errors import UsageError
from merge.needs import need

FINETUNE, QUANTIZE, EVAL = (f"pip install 'merge-workbench[{extra}]'." for extra in ("finetune", "quantize", "eval"))
# words -> what is missing, and what is said
VERBS = {
    "finetune --model m --data d.jsonl -o out": (["accelerate", "peft"], f"accelerate and peft: {FINETUNE}"),
    "finetune --model m --data d.jsonl -o out --train qlora": (
        ["bitsandbytes"],
        f"train: qlora needs bitsandbytes: {FINETUNE}",
    ),
    "finetune continue adapter -o out": (["peft"], f"needs peft: {FINETUNE}"),
    "quantize m -o out --to nf4": (["bitsandbytes"], f"needs bitsandbytes: {QUANTIZE} Or leave"),
    "quantize m -o out --to int4": (["compressed_tensors"], f"needs compressed_tensors: {QUANTIZE}"),
    "quantize m -o out --to fp8": (["accelerate"], f"needs accelerate: {QUANTIZE}"),
    "eval m --suite quickstart": (["lm_eval"], f"needs lm_eval: {EVAL}"),
    "soup m m --suite quickstart": (["accelerate"], f"needs accelerate: {EVAL}"),
    "compare m m --suite quickstart": (["lm_eval"], f"needs lm_eval: {EVAL}"),
    "eval m --suite quickstart --backend vllm": (["vllm"], "--backend vllm needs vllm: pip install 'lm-eval[vllm]'."),
    "eval m --suite quickstart --backend local-completions": (["tenacity"], "tenacity: pip install 'lm-eval[api]'."),
    "generate quantised --prompt a": (["bitsandbytes"], f"quantised by bitsandbytes needs bitsandbytes: {QUANTIZE}"),
    "generate m+adapter --prompt a": (["peft"], f"an adapter needs peft: {FINETUNE}"),
    "classify m+adapter --text a": (["peft"], f"an adapter needs peft: {FINETUNE}"),
}
# Each verb in turn, in one process, as if its packages were not installed.
RUN = """
import importlib.util, json, sys
from merge.cli import cli
from merge.errors import UsageError
found, real = {}, importlib.util.find_spec
for words, (missing, _) in json.loads(sys.argv[1]).items():
    importlib.util.find_spec = lambda name, *more: None if name in missing else real(name, *more)
    try:
        cli(words.split(), standalone_mode=False)
    except UsageError as error:
        found[words] = [str(error), [name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]]
print(json.dumps(found))
"""


def test_every_verb_says_what_it_needs_before_it_works(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    make_model(tmp_path / "m")
    make_model(tmp_path / "quantised")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config | quantised))
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "m")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "d.jsonl").write_text('{"text": "w1 w2"}\n')
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, json.dumps(VERBS)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for words, (_, said) in VERBS.items():
        assert said in found[words][0], words
        assert found[words][1] == [], words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "missing", "said"),
    [
        (Config(tensorboard=True), "tensorboard", "pip install 'merge-workbench[tensorboard]'"),
        (Config(optimizer="adamw_8bit"), "bitsandbytes", "pip install 'merge-workbench[finetune]'"),
        (Config(attention="flash_attention_2"), "flash_attn", "pip install 'flash-attn'"),
        (Config(data=(DataSource("d.parquet"),)), "pyarrow", "data d.parquet: parquet needs pyarrow"),
    ],
)
def test_what_a_config_asks_for(monkeypatch: pytest.MonkeyPatch, config: Config, missing: str, said: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else True)
    with pytest.raises(UsageError) as caught:
        check_packages(config)
    assert said in str(caught.value)
    check_packages(Config())


def test_what_is_there_is_not_asked_for() -> None:
    need("this", "finetune", "json", "pytest")
