"""merge generate and merge classify, on models of a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import TOKENIZER, Output, llama_config, write_json
from safetensors.torch import load_file
from tiny_bert import make_tiny_bert
from tiny_llama import make_tiny_llama, words, write_lines
from toy_data import moods

from merge.adapters.fold import open_model
from merge.errors import CheckpointError, MergeError, UsageError
from merge.recipe.references import parse_reference
from merge.tools.classify import classify
from merge.tools.generate import Sampling, _until, as_chat, generate
from merge.tools.loaded import load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of a name in transformers


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path / "model", seed=3)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    import torch
    from transformers import AutoConfig, LlamaForSequenceClassification

    path = tmp_path / "classifier"
    path.mkdir()
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    write_json(path / "config.json", llama_config(1, 16, True, "float32") | labels)
    torch.manual_seed(0)
    LlamaForSequenceClassification(AutoConfig.from_pretrained(path)).save_pretrained(path)
    write_json(path / "tokenizer.json", TOKENIZER)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    return path


def run(verb: str, *args: str | Path) -> Result:
    import importlib

    return CliRunner().invoke(importlib.import_module(f"merge.cli.{verb}").command, [str(arg) for arg in args])


def test_greedy_text_is_transformers_own_and_comes_in_pieces(model: Path) -> None:
    import torch

    loaded = load(str(model))
    pieces = list(generate(loaded, "w1 w2", Sampling(max_tokens=8)))
    assert len(pieces) > 1
    tokens = loaded.tokenizer("w1 w2", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(8):
            tokens = torch.cat([tokens, loaded.network(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert "".join(pieces).split() == loaded.tokenizer.decode(tokens[0, 2:], skip_special_tokens=True).split()


def test_sampling_depends_on_the_seed_alone(model: Path) -> None:
    loaded = load(str(model))
    texts = ["".join(generate(loaded, "w1", Sampling(12, 1.5, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    likeliest = "".join(generate(loaded, "w1", Sampling(12, 1.5, top_k=1)))
    assert likeliest == "".join(generate(loaded, "w1", Sampling(12)))


@pytest.mark.parametrize(
    ("stops", "text"), [(("c",), "ab"), (("bcd",), "a"), (("x", "de"), "abc"), (("dx",), "abcdef"), (("a",), "")]
)
def test_a_stop_text_ends_it_even_across_pieces(stops: tuple[str, ...], text: str) -> None:
    def pieces() -> Iterator[str]:
        yield from ("a", "b", "cd", "ef")

    assert "".join(_until(pieces(), stops)) == text


def test_a_chat_goes_through_the_template(model: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        as_chat(load(str(model)), [{"role": "user", "content": "w1"}])
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1"}]
    assert as_chat(load(str(model)), messages) == "system:w5;user:w1;"
    assert run("generate", model, "--prompt", "w1", "--chat", "--system", "w2", "--max-tokens", "2").exit_code == 0


def test_an_adapter_is_used_by_its_base_and_by_itself(model: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(1, 6)[None]
    for text in (f"{model}+{tmp_path / 'adapter'}", str(tmp_path / "adapter")):
        with torch.inference_mode():
            assert load(text).network(input_ids=tokens).logits.equal(adapted(input_ids=tokens).logits)


def test_a_file_of_prompts_gives_a_line_of_json_each(
    model: Path, tmp_path: Path, call_cli: Callable[..., Output]
) -> None:
    (tmp_path / "prompts.txt").write_text("w1\n\nw2 w3\n")
    done = call_cli(["generate", model, "--file", tmp_path / "prompts.txt", "--max-tokens", "3", "--json"])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.code == 0
    assert [line["prompt"] for line in lines] == ["w1", "w2 w3"]
    assert all(line["text"] for line in lines)


def test_a_recipe_is_merged_on_the_fly(model: Path, tmp_path: Path, call_cli: Callable[..., Output]) -> None:
    (tmp_path / "work").mkdir()
    single = f"merge_method: linear\nmodels:\n- {{model: {model}, parameters: {{weight: 1}}}}\n"
    (tmp_path / "one.yaml").write_text(single)
    (tmp_path / "two.yaml").write_text(
        f"name: first\n{single}---\nmerge_method: linear\nmodels:\n- {{model: first, parameters: {{weight: 1}}}}\n"
    )
    asked = ["--prompt", "w1 w2", "--max-tokens", "5", "--json"]
    alone = call_cli(["generate", model, *asked])
    assert (alone.code, alone.stderr) == (0, "")
    for file in ("one.yaml", "two.yaml"):
        merged = call_cli(["generate", file, *asked], env={"MERGE_EVAL_TMP": str(tmp_path / "work")})
        assert (merged.code, merged.stdout, merged.stderr) == (0, alone.stdout, f"merging {file}\n")
    assert list((tmp_path / "work").iterdir()) == []


def test_an_adapter_brings_its_head_and_its_labels(tmp_path: Path) -> None:
    from finetune.config import load_config
    from finetune.prepare import prepare
    from finetune.train import finetune

    model = make_tiny_llama(tmp_path / "model")
    data = write_lines(tmp_path / "moods.jsonl", moods(60))
    for train in ("lora", "bottleneck"):
        flags = {"model": model, "data": data, "out": tmp_path / train, "train": train, "max_steps": 60}
        flags |= {"learning_rate": 1e-2}
        finetune(prepare(load_config(None, {name: [str(value)] for name, value in flags.items()})), device="cpu")
        rows = moods(60)
        for text in (str(tmp_path / train), f"{model}+{tmp_path / train}"):
            loaded = load(text, "AutoModelForSequenceClassification")
            found = classify(loaded, [row["text"] for row in rows])
            assert set(found[0]) == {"flat", "high", "low"}
            right = [next(iter(labels)) == row["label"] for labels, row in zip(found, rows, strict=True)]
            assert sum(right) > 50
    causal = {"model": model, "data": write_lines(tmp_path / "words.jsonl", words(8)), "out": tmp_path / "writer"}
    finetune(prepare(load_config(None, {name: [str(value)] for name, value in causal.items()})), device="cpu")
    with pytest.raises(CheckpointError, match=r"lacks score\.weight"):
        load(str(tmp_path / "writer"), "AutoModelForSequenceClassification")


def test_an_adapter_with_new_tokens_is_put_into_a_larger_base(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.config import load_config
    from finetune.prepare import prepare
    from finetune.train import finetune

    model = make_tiny_llama(tmp_path / "model", dtype="float32")
    rows = [{"prompt": "@a=", "completion": "@@A"}] * 8
    flags = {"model": model, "data": write_lines(tmp_path / "d.jsonl", rows), "out": tmp_path / "out"}
    flags |= {"new_tokens": "@", "learning_rate": 2e-2, "max_steps": 4}
    finetune(prepare(load_config(None, {name: [str(value)] for name, value in flags.items()})), device="cpu")
    assert not any("base_layer" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(len(tokenizer := AutoTokenizer.from_pretrained(tmp_path / "out")))
    PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")  # as docs/finetune.md says

    def logits(text: str) -> torch.Tensor:
        loaded = load(text)  # "@" is <unk> to the base
        with torch.inference_mode():
            return loaded.network(**loaded.tokenizer("@a=@@A", return_tensors="pt")).logits[0]

    untrained, expected = logits(str(model)), logits(str(tmp_path / "whole"))
    for text in (str(tmp_path / "out"), f"{model}+{tmp_path / 'out'}"):
        found = logits(text)
        assert found.shape == (6, 80)  # the 79 tokens of the base, and @
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (found[:, :79] - untrained).abs().amax() > 0.1
    with pytest.raises(CheckpointError, match=r"rows for tokens up to 79, and .* ends with 78\. Fold it with PEFT"):
        open_model(parse_reference(f"{model}+{tmp_path / 'out'}"))


def test_probabilities_are_the_softmax_of_the_models_logits(classifier: Path) -> None:
    import torch

    loaded = load(str(classifier), "AutoModelForSequenceClassification")
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    found = classify(loaded, texts)
    for text, labels in zip(texts, found, strict=True):
        assert list(labels.values()) == sorted(labels.values(), reverse=True)
        with torch.inference_mode():
            logits = loaded.network(input_ids=loaded.tokenizer(text, return_tensors="pt")["input_ids"]).logits[0]
        expected = dict(zip(("bad", "fair", "good"), logits.softmax(-1).tolist(), strict=True))
        assert labels == pytest.approx(expected, abs=1e-6)


def test_classify_prints_a_table_and_json(classifier: Path) -> None:
    table = run("classify", classifier, "--text", "w1 w2", "--top", "1")
    assert table.exit_code == 0, table.exception
    assert table.output.splitlines()[0].split() == ["text", "label", "probability"]
    line: dict[str, Any] = json.loads(run("classify", classifier, "--text", "w1 w2", "--json").output)
    assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_what_is_cut_is_said_and_nothing_is_no_text(classifier: Path) -> None:
    done = run("classify", classifier, "--text", "w1 " * 80, "--text", "w2", "--json")
    assert "note: 1 of 2 texts are longer than the model's 64 tokens" in done.stderr
    empty = run("classify", classifier, "--text", "w1", "--text", "")
    assert "text 2: expected some text, found none" in str(empty.exception)


def test_a_language_model_is_no_classifier(model: Path) -> None:
    result = run("classify", model, "--text", "w1")
    assert isinstance(result.exception, CheckpointError)
    assert "score.weight" in str(result.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected --prompt or --file"),
        (["--prompt", "a", "--file", "b"], "give one of them"),
        (["--prompt", "w1", "--system", "b"], "needs --chat"),
        (["--prompt", "w1", "--max-tokens", "1000"], "64 positions"),
        (["--file", "nowhere.txt"], "cannot be read"),
        (["--prompt", ""], "found none"),
        (["--prompt", "w1", "--stop", ""], "--stop"),
        (["--prompt", "w1 " * 80], "the prompt has 80 tokens, which leaves none to write"),
        (["--prompt", "w1", "--temperature", "nan"], "--temperature: expected a number"),
    ],
)
def test_bad_arguments(model: Path, args: list[str], message: str) -> None:
    result = run("generate", model, *args)
    assert isinstance(result.exception, MergeError)
    assert message in str(result.exception)


def test_a_model_that_fills_gaps_does_not_write(tmp_path: Path) -> None:
    make_tiny_bert(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"bert: is not a causal language model \(it is a BertForMaskedLM"):
        load(str(tmp_path / "bert"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        load("./nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="no adapter_config"):
        load(f"{tmp_path / 'a'}+{tmp_path / 'b'}")
