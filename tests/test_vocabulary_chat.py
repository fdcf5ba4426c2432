"""chat_template in recipes, and the report of `merge tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vocabularies import give, train

from merge import build_plan, parse_recipe, run_plan
from merge.chat import named as chat
from merge.chat.render import syntax_error
from merge.errors import CheckpointError, RecipeError
from merge.recipe import parse_reference
from merge.vocabulary.report import describe

Make = Callable[..., Path]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture
def three(tmp_path: Path, make_model: Make) -> list[Path]:
    """Three models with chat templates in the three places where they may lie."""
    tokenizer = train("bytes", "sea", special=["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    paths = [
        give(make_model, tmp_path / name, tokenizer, seed=i, config=config | extra)
        for i, (name, extra) in enumerate(
            {"a": {"chat_template": "A{{ messages[0]['content'] }}"}, "b": {}, "c": {}}.items()
        )
    ]
    (paths[1] / "chat_template.jinja").write_text("B{{ messages[0]['content'] }}\n")
    (paths[2] / "chat_template.json").write_text(json.dumps({"chat_template": "B{{ messages[0]['content'] }}"}))
    return paths


def merged(paths: list[Path], more: str, out: Path) -> Any:
    from transformers import AutoTokenizer

    models = "".join(f"  - {{model: {path}, parameters: {{weight: 1}}}}\n" for path in paths)
    run_plan(build_plan(parse_recipe(f"merge_method: linear\nmodels:\n{models}{more}\n")), out)
    return AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("more", ["", "\ntokenizer_source: union"])
def test_auto_is_what_most_inputs_have(tmp_path: Path, three: list[Path], more: str) -> None:
    tokenizer = merged(three, "chat_template: auto" + more, tmp_path / "out")
    assert tokenizer.chat_template.strip() == "B{{ messages[0]['content'] }}"
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").glob("chat_template*")) == ["chat_template.jinja"]


def test_without_the_key_the_donors_stays(tmp_path: Path, three: list[Path]) -> None:
    assert merged(three, "", tmp_path / "out").chat_template == "A{{ messages[0]['content'] }}"


def test_a_text_over_several_lines(tmp_path: Path, three: list[Path]) -> None:
    more = (
        "chat_template: |\n  {% for message in messages %}\n  [{{ message['content'] }}]\n"
        "  {% generation %}x{% endgeneration %}\n  {% endfor %}"
    )
    tokenizer = merged(three, more, tmp_path / "out")
    said = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "".join(said.split()) == "[Bebrief.]x[Hello?]x[Hi.]x[Why?]x"


EXPECTED = {
    "chatml": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHello? [/INST] Hi.</s>[INST] Why? [/INST]",
    "gemma": "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<|user|>\nWhy?</s>\n<|assistant|>\n",
    "vicuna": "ASSISTANT: Hi.</s>\nUSER: Why?\nASSISTANT:",
    "alpaca": "### Instruction:\nWhy?\n\n### Response:\n",
}


def test_known_names(tmp_path: Path, three: list[Path]) -> None:
    from transformers import AutoTokenizer

    assert set(EXPECTED) == set(chat.NAMED)
    tokenizer = AutoTokenizer.from_pretrained(three[0])
    for name, template in chat.NAMED.items():
        assert syntax_error(template) is None
        said = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert said.endswith(EXPECTED[name])
        assert said.count("Be brief.") == said.count("Hi.") == 1
    assert merged(three, "chat_template: chatml", tmp_path / "out").chat_template == chat.NAMED["chatml"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("chat_template: chatlm", 'unknown chat_template "chatlm"; did you mean "chatml"?'),
        ("chat_template: 'Hello'", "known: auto, chatml"),
        ("chat_template: '{% for m in messages %}'", '"chat_template" is not a valid Jinja template: line 1'),
        ("tokenizer: {source: union, tokens: {a: {source: {kind: one}}}}", 'unknown kind "one"'),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: org/a}}}}", 'one of "token" and "token_id"'),
        ("tokenizer: {tokens: {a: {force: true}}}", '"force: true" of the token "a" needs a "source"'),
        ("tokenizer: {tokens: {a: {force: maybe}}}", '"force" must be true or false'),
        ("tokenizer: {tokens: {a: {sauce: org/a}}}", '"source"'),
        ("tokenizer: {tokens: {a: {source: {kind: zero, model: org/a}}}}", "has no other key"),
        ("tokenizer: {pad_to_multiple_of: 0}", '"pad_to_multiple_of" must be a whole number from 1'),
        ("tokenizer: {tokens: [a]}", '"tokens" must be a mapping'),
        ("tokenizer_source: base\ntokenizer: {source: base}", "have the same meaning"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(more: str, said: str) -> None:
    text = "merge_method: linear\nmodels:\n  - {model: org/a, parameters: {weight: 1}}\n"
    text += "  - {model: org/b, parameters: {weight: 1}}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text + more + "\n", "r.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("r.yaml:")


def test_a_template_needs_a_tokenizer(tmp_path: Path, make_model: Make) -> None:
    path = give(make_model, tmp_path / "a", None, seed=0)
    text = f"merge_method: passthrough\nmodels: [{{model: {path}}}]\nchat_template: chatml\n"
    with pytest.raises(RecipeError, match="no tokenizer, which a chat template needs"):
        build_plan(parse_recipe(text))


# merge tokenizers


def test_the_report(tmp_path: Path, make_model: Make, three: list[Path], call_cli: Callable[..., Any]) -> None:
    other = give(make_model, tmp_path / "other", train("unigram", "sea", special=["<s>"]), seed=5, padding=3)
    bare = tmp_path / "bare"
    bare.mkdir()
    train("bytes", "code", special=["<s>"]).save(str(bare / "tokenizer.json"))
    code, shown, said = call_cli(["tokenizers", three[0], three[1], other, bare, "--json"])
    assert code == 0, said
    report = json.loads(shown)
    assert [facts["type"] for facts in report["tokenizers"]] == ["BPE", "BPE", "Unigram", "BPE"]
    assert [facts["alphabet"] for facts in report["tokenizers"]] == ["bytes", "bytes", "metaspace", "bytes"]
    rows = [facts["embedding_rows"] for facts in report["tokenizers"]]
    tokens = [facts["tokens"] for facts in report["tokenizers"]]
    assert rows == [tokens[0], tokens[1], tokens[2] + 3, None]
    twin, families, texts = report["comparisons"]
    assert twin["same_ids"]
    assert not twin["same_chat_template"]
    assert families["same_text"] > families["shared"] > 0  # " ship" is "Ġship" here and "▁ship" there
    assert families["special"]["eos_token"] == ["</s>", None]
    first, last = (train("bytes", text).get_vocab() for text in ("sea", "code"))
    assert texts["only_other"] == len(set(last) - set(first))
    assert texts["only_first"] == len(set(first) - set(last)) + 1  # and </s>
    moved = [token for token in last if token in first and first[token] != last[token]]
    assert texts["moved"] >= len(moved) > 0
    merges = json.loads((bare / "tokenizer.json").read_text())["model"]["merges"]
    assert texts["merges_shared"] + texts["merges_only_other"] == len(merges)
    code, shown, said = call_cli(["tokenizers", three[0], bare])
    assert code == 0, said
    assert "only the first has" in shown
    assert "tokens per byte, Chinese" in shown


def test_bad_tokenizers(tmp_path: Path, call_cli: Callable[..., Any]) -> None:
    assert call_cli(["tokenizers", tmp_path / "x"]).code == 2
    (tmp_path / "empty").mkdir()
    code, _, said = call_cli(["tokenizers", tmp_path / "empty"])
    assert code == 1
    assert "has no tokenizer: expected tokenizer.json" in said
    texts = ("{", "[]", "{}", '{"model": {"vocab": {"a": -1}}}', '{"model": {"type": "Odd", "vocab": {"a": 0}}}')
    for i, text in enumerate(texts):
        path = tmp_path / str(i)
        path.mkdir()
        (path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            describe(parse_reference(str(path)))
        assert str(caught.value).startswith(str(path))
