"""merge statistics, and the two methods that read what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from architectures import build
from conftest import TOKENIZER, VOCABULARY, write_json, write_safetensors
from safetensors.numpy import load_file

from merge import build_plan, parse_recipe, run_plan
from merge.errors import CheckpointError, NumbersError, RecipeError, SourceChanged, UsageError
from merge.layerwise import LayerRunner, Unstreamable
from merge.methods.fisher import fisher
from merge.methods.regmean import regmean
from merge.plan import Plan
from merge.recipe import parse_reference
from merge.statistics import StatisticsSummary, collect_statistics
from merge.statistics.parts import Parts

Arrays = dict[str, npt.NDArray[np.float32]]


def model_of(path: Path, config: Any) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from the initial values, so that layers do something
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    write_json(path / "tokenizer.json", TOKENIZER)
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})


def sizes(tied: bool = False) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    return model_of(tmp_path / "tiny", LlamaConfig(**sizes()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    lengths = [7, 12, 12, 3, 30, 12, 1]
    texts = [" ".join(f"w{i}" for i in random.integers(1, VOCABULARY, length)) for length in lengths]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def collect(model: Path, data: Path, out: Path, **options: Any) -> StatisticsSummary:
    return collect_statistics(parse_reference(str(model)), data, out, **({"length": 12, "batch": 2} | options))


def sequences(data: Path) -> list[list[int]]:
    """What `data` is as token numbers at a length of 12, in any order."""
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    numbers = [[int(word[1:]) for word in text.split()] for text in texts]
    pieces = [text[start : start + 12] for text in numbers for start in range(0, len(text), 12)]
    return [piece for piece in pieces if len(piece) > 1]


def direct_grams(path: Path, data: Path) -> Arrays:
    """Hooks on every linear layer of the whole model, a sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tied = {name for name in ("lm_head",) if model.config.tie_word_embeddings}
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in tied:
            key = f"gram.{name}.weight"

            def add(module: Any, inputs: Any, output: Any, key: str = key) -> None:
                flat = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                sums[key] = sums.get(key, 0) + flat.T @ flat

            module.register_forward_hook(add)
    with torch.no_grad():
        for sequence in sequences(data):
            model(torch.tensor([sequence]))
    return {name: total.float().numpy() for name, total in sums.items()}


def assert_near(got: Arrays, expected: Arrays) -> None:
    assert sorted(got) == sorted(expected)
    for name, values in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], values, rtol=1e-4, atol=1e-5 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["LlamaConfig", "Gemma2Config", "Qwen3Config"])
def test_layer_by_layer_equals_hooks_on_the_whole_model(tmp_path: Path, data: Path, kind: str, tied: bool) -> None:
    import transformers

    own = {"sliding_window": 4, "query_pre_attn_scalar": 8} if kind == "Gemma2Config" else {}
    path = model_of(tmp_path / "model", getattr(transformers, kind)(**sizes(tied), **own))
    summary = collect(path, data, tmp_path / "out.safetensors")
    assert summary.notes == ()
    assert summary.tokens == sum(map(len, sequences(data)))
    assert_near(load_file(tmp_path / "out.safetensors"), direct_grams(path, data))
    assert not (tmp_path / "out.safetensors.partial").exists()


@pytest.mark.parametrize("name", ["opt", "falcon", "mixtral"])
def test_what_is_outside_the_layers_or_renamed_has_its_statistics(tmp_path: Path, data: Path, name: str) -> None:
    """OPT projects its embeddings, Falcon's layers give tuples, Mixtral's experts are stacked in memory."""
    path = tmp_path / "model"
    build(name).save_pretrained(path)
    write_tokenizer(path)
    assert collect(path, data, tmp_path / "out.safetensors").notes == ()
    found, expected = load_file(tmp_path / "out.safetensors"), direct_grams(path, data)
    assert_near(found, expected)
    assert name != "opt" or "gram.model.decoder.project_in.weight" in found


def test_a_model_without_linear_layers_has_no_statistics_for_regmean(tmp_path: Path, data: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no linear layers whose inputs"):
        collect(tmp_path / "model", data, tmp_path / "out.safetensors")


def test_a_model_that_cannot_be_streamed_is_held_whole_with_a_note(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(runner: LayerRunner) -> None:
        raise Unstreamable("of the moon")

    monkeypatch.setattr("merge.layerwise.opening.check_end", cannot)
    said: list[str] = []
    summary = collect(tiny, data, tmp_path / "out.safetensors", say=said.append)
    assert summary.notes == tuple(said)
    assert said[0].endswith("GB: of the moon.")
    assert_near(load_file(tmp_path / "out.safetensors"), direct_grams(tiny, data))
    with pytest.raises(UsageError, match="--max-ram"):
        collect(tiny, data, tmp_path / "other.safetensors", max_ram=1000)
    with pytest.raises(UsageError, match="Fisher information needs the whole model"):
        collect(tiny, data, tmp_path / "other.safetensors", kind="fisher", max_ram=1000)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    collect(tiny, data, tmp_path / "whole.safetensors")
    save, out = Parts.save, tmp_path / "out.safetensors"

    def killed(parts: Parts, name: str, tensors: Any) -> None:
        if len(list(parts.directory.glob("gram-*.safetensors"))) == stop:
            parts.path(name + ".new").write_bytes(b"half")
            raise KeyboardInterrupt
        save(parts, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny, data, out)
    assert not out.exists()
    with pytest.raises(UsageError, match="unfinished work of another run"):
        collect(tiny, data, out, seed=1)
    assert collect(tiny, data, out).resumed_parts == stop
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_fisher_is_the_mean_of_squared_gradients_of_each_sequence(tmp_path: Path, tiny: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    collect(tiny, data, tmp_path / "out.safetensors", kind="both")
    got = load_file(tmp_path / "out.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for sequence in sequences(data):
        model.zero_grad()
        tokens = torch.tensor([sequence])
        (-model(tokens, labels=tokens).loss * (len(sequence) - 1)).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.double() ** 2 / len(sequences(data))
    own = {name: value for name, value in got.items() if name.startswith("fisher.")}
    assert_near(own, {f"fisher.{name}": value.float().numpy() for name, value in expected.items()})
    assert any(name.startswith("gram.") for name in got)


def test_max_tokens_and_seed_choose_the_texts(tmp_path: Path, tiny: Path, data: Path) -> None:
    assert collect(tiny, data, tmp_path / "a", max_tokens=20).tokens <= 20
    collect(tiny, data, tmp_path / "b", max_tokens=20)
    collect(tiny, data, tmp_path / "c", max_tokens=20, seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_line_that_is_no_text_is_named(tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"texts": 1}\n')
    with pytest.raises(UsageError, match=r'bad\.jsonl:2: expected an object with a "text"'):
        collect(tiny, path, tmp_path / "out")


def test_the_command(tmp_path: Path, tiny: Path, data: Path, call_cli: Callable[..., Any]) -> None:
    out = tmp_path / "out.safetensors"
    command = ["statistics", tiny, "--data", data, "-o", out, "--json"]
    code, stdout, stderr = call_cli([*command, "--kind", "both"])
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["tensors"] == 3 * 7 + 1 + 3 * 9 + 3
    code, stdout, stderr = call_cli(command)
    assert (code, stdout) == (2, "")
    assert "exists; nothing was changed" in stderr
    assert call_cli(["statistics", tmp_path / "nowhere", "--data", data, "-o", out])[0] == 2


# ---- methods


def test_regmean_of_linear_regressors_is_the_pooled_solution() -> None:
    random = np.random.default_rng(1)
    truth = random.standard_normal((3, 8))
    inputs = [random.standard_normal((50, 8)) @ random.standard_normal((8, 8)) for _ in range(3)]
    outputs = [x @ (truth + 0.3 * random.standard_normal(truth.shape)).T for x in inputs]
    each = [np.linalg.lstsq(x, y)[0].T for x, y in zip(inputs, outputs, strict=True)]
    pooled = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs))[0].T
    grams = tuple(torch.from_numpy(x.T @ x) for x in inputs)
    got = regmean(torch.from_numpy(np.stack(each)), alpha=1.0, _statistics=grams)
    np.testing.assert_allclose(got.numpy(), pooled, rtol=1e-10, atol=1e-12)


def test_regmean_with_alpha_is_the_papers_formula_and_unseen_inputs_are_averaged() -> None:
    random = np.random.default_rng(2)
    weights = random.standard_normal((2, 3, 5)).astype(np.float32)
    inputs = random.standard_normal((2, 40, 5)).astype(np.float32)
    inputs[:, :, 4] = 0
    grams = inputs.transpose(0, 2, 1) @ inputs
    got = regmean(torch.from_numpy(weights), alpha=0.7, _statistics=tuple(map(torch.from_numpy, grams))).numpy()
    scaled = 0.7 * grams.astype(np.float64) + 0.3 * np.stack([np.diag(np.diag(gram)) for gram in grams])
    seen = scaled[:, :4, :4]
    expected = sum(w[:, :4] @ g for w, g in zip(weights, seen, strict=True)) @ np.linalg.inv(seen.sum(axis=0))
    np.testing.assert_allclose(got[:, :4], expected, rtol=1e-6)
    np.testing.assert_allclose(got[:, 4], weights.mean(axis=0)[:, 4], rtol=1e-6)


def test_regmean_of_a_singular_system_fits_what_was_seen() -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((2, 3, 6))
    inputs = random.standard_normal((2, 2, 6))  # two rows for each, of six dimensions
    grams = tuple(torch.from_numpy(x.T @ x) for x in inputs)
    got = regmean(torch.from_numpy(weights), alpha=1.0, _statistics=grams).numpy()
    for own, x in zip(weights, inputs, strict=True):
        np.testing.assert_allclose(x @ got.T, x @ own.T, rtol=1e-6)


def test_fisher_weighs_each_entry_and_holds_the_floor() -> None:
    models = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    information = (torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    got = fisher(models, weight=(1.0, 1.0), epsilon=0.5, _statistics=information)
    np.testing.assert_allclose(got.numpy(), [1.5, 7 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(
        fisher(models, weight=(1.0, 3.0), _statistics=information[:1] * 2).numpy(), [2.5, 2.5, 2.5], rtol=1e-6
    )


# ---- recipes


@pytest.fixture
def pair(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """Models a and b with statistics of both kinds; those of b equal a's in their Fisher information."""
    random = np.random.default_rng(4)
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
        tensors = load_file(tmp_path / name / "model.safetensors")
        grams, information = {}, {}
        for tensor, value in tensors.items():
            information[f"fisher.{tensor}"] = (np.full(value.shape, 0.25, np.float32), "float32")
            if "proj" in tensor:
                x = random.standard_normal((40, value.shape[1])).astype(np.float32)
                grams[f"gram.{tensor}"] = (x.T @ x, "float32")
        write_safetensors(tmp_path / f"{name}.gram.safetensors", grams)
        write_safetensors(tmp_path / f"{name}.fisher.safetensors", information)
    return tmp_path


def recipe(root: Path, method: str, kind: str = "", more: str = "") -> str:
    kind = kind or {"regmean": "gram"}.get(method, method)
    models = "".join(
        f"  - model: {root / name}\n    statistics: {root / f'{name}.{kind}.safetensors'}\n" for name in "ab"
    )
    return f"merge_method: {method}\nmodels:\n{models}{more}"


def merged(root: Path, text: str, out: str) -> Arrays:
    run_plan(build_plan(parse_recipe(text)), root / out)
    return load_file(root / out / "model.safetensors")


def test_a_regmean_recipe_solves_linear_layers_and_averages_the_rest(pair: Path) -> None:
    got = merged(pair, recipe(pair, "regmean"), "out")
    a, b = (load_file(pair / name / "model.safetensors") for name in "ab")
    grams = [load_file(pair / f"{name}.gram.safetensors") for name in "ab"]
    for name, value in got.items():
        own = tuple(torch.from_numpy(gram[f"gram.{name}"]) for gram in grams if f"gram.{name}" in gram)
        expected = regmean(torch.from_numpy(np.stack([a[name], b[name]])), _statistics=own)
        np.testing.assert_array_equal(value, expected.float().numpy())
        assert np.allclose(value, (a[name] + b[name]) / 2) == ("proj" not in name)
    manifest = json.loads((pair / "out" / "merge_manifest.json").read_bytes())
    assert len(manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]["statistics"]) == 2
    assert "statistics" not in manifest["tensors"]["model.norm.weight"]


def test_equal_fisher_information_gives_linear(pair: Path) -> None:
    got = merged(pair, recipe(pair, "fisher"), "fisher")
    text = (
        f"merge_method: linear\nmodels: [{{model: {pair / 'a'}}}, {{model: {pair / 'b'}}}]\nparameters: {{weight: 1}}"
    )
    for name, value in merged(pair, text, "linear").items():
        np.testing.assert_allclose(got[name], value, rtol=1e-7)


def test_slices_take_the_statistics_of_the_layer_they_take(pair: Path) -> None:
    sources = ", ".join(
        f"{{model: {pair / name}, layer_range: {layers}, statistics: {pair / f'{name}.gram.safetensors'}}}"
        for name, layers in (("a", [1, 2]), ("b", [0, 1]))
    )
    plan = build_plan(parse_recipe(f"merge_method: regmean\nslices: [{{sources: [{sources}]}}]"))
    step = next(step for step in plan.steps if step.name == "model.layers.0.mlp.up_proj.weight")
    assert [ref.name for ref in step.statistics] == [f"gram.model.layers.{i}.mlp.up_proj.weight" for i in (1, 0)]


def test_a_plan_carries_its_statistics_through_json_and_counts_their_bytes(pair: Path) -> None:
    plan = build_plan(parse_recipe(recipe(pair, "fisher")))
    assert Plan.from_json(plan.to_json()) == plan
    without = dataclasses.replace(plan, steps=tuple(dataclasses.replace(step, statistics=()) for step in plan.steps))
    assert plan.bytes_read == 2 * without.bytes_read
    assert [Path(file.path).name for file in plan.statistics_files] == ["a.fisher.safetensors", "b.fisher.safetensors"]


def test_statistics_that_change_after_the_plan_are_an_error(pair: Path) -> None:
    plan = build_plan(parse_recipe(recipe(pair, "fisher")))
    with open(pair / "a.fisher.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(SourceChanged):
        run_plan(plan, pair / "out")


def test_statistics_with_nan_are_an_error(pair: Path) -> None:
    tensors = load_file(pair / "a.fisher.safetensors")
    tensors["fisher.model.norm.weight"][2] = np.nan
    write_safetensors(pair / "a.fisher.safetensors", {name: (value, "float32") for name, value in tensors.items()})
    with pytest.raises(NumbersError, match=r"fisher\.model\.norm\.weight: NaN"):
        run_plan(build_plan(parse_recipe(recipe(pair, "fisher"))), pair / "out")


KEY = "model.layers.0.mlp.up_proj.weight"


def change(path: Path, name: str, value: npt.NDArray[np.float32] | None) -> None:
    """Another tensor under that name, or none."""
    tensors = load_file(path)
    del tensors[name]
    if value is not None:
        tensors[name] = value
    write_safetensors(path, {name: (value, "float32") for name, value in tensors.items()})


def nothing(root: Path) -> None:
    pass


PROBLEMS: dict[str, tuple[Callable[[Path], object], Callable[[Path], str], str]] = {
    "missing": (
        nothing,
        lambda root: f"merge_method: regmean\nmodels: [{{model: {root / 'a'}}}]",
        'regmean needs "statistics" for model',
    ),
    "of no use": (
        nothing,
        lambda root: recipe(root, "linear", "gram", "parameters: {weight: 1}"),
        'linear uses no statistics; remove "statistics" of model',
    ),
    "wrong kind": (nothing, lambda root: recipe(root, "regmean", "fisher"), "has fisher, and gram is needed"),
    "no file": (nothing, lambda root: recipe(root, "regmean", "other"), "there is no statistics file"),
    "no text": (
        nothing,
        lambda root: recipe(root, "fisher").replace("statistics: ", "statistics: 3 #"),
        '"statistics" must be a string, not 3',
    ),
    "align": (
        nothing,
        lambda root: recipe(root, "regmean", more="align: permutation\n"),
        '"align" puts units in another order than the statistics',
    ),
    "damaged": (
        lambda root: (root / "a.gram.safetensors").write_bytes(b"12345"),
        lambda root: recipe(root, "regmean"),
        "is only 5 bytes long",
    ),
    "shape": (
        lambda root: change(root / "a.gram.safetensors", f"gram.{KEY}", np.ones((3, 3), np.float32)),
        lambda root: recipe(root, "regmean"),
        f"{KEY}: the gram of",
    ),
    "lacking": (
        lambda root: change(root / "b.fisher.safetensors", f"fisher.{KEY}", None),
        lambda root: recipe(root, "fisher"),
        f"{KEY}: the statistics of",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_of_statistics_are_problems_of_the_recipe(pair: Path, case: str) -> None:
    prepare, text, message = PROBLEMS[case]
    prepare(pair)
    with pytest.raises(RecipeError, match=message):
        build_plan(parse_recipe(text(pair), str(pair / "recipe.yaml")))


def test_such_a_problem_ends_with_exit_code_2_and_its_line(pair: Path, call_cli: Callable[..., Any]) -> None:
    (pair / "recipe.yaml").write_text(recipe(pair, "regmean", "fisher"))
    code, out, err = call_cli(["run", "recipe.yaml"])
    assert (code, out) == (2, "")
    assert "recipe.yaml:3: " in err
