"""merge search and merge sweep on tiny models: reports are of the recipe that is written, on items of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import judging
import pytest
from click.testing import CliRunner
from judging import Run

from eval.harness import evaluate
from eval.memory import Memory
from eval.models import subjects
from eval.results_file import load_results
from eval.search.genome import open_recipe
from eval.search.judges import Candidate, TaskJudge, refuse_test_sets
from eval.search.run import search
from eval.search.space import Space
from eval.search.sweep import points_of, setting_of, swept
from eval.settings import Settings
from eval.tasks import resolve
from eval.tasks.task import Task
from merge import build_plan, load_recipe
from merge.cli import cli
from merge.errors import RecipeError, UsageError
from merge.output.manifest import side_file_bytes

memory, tiny, choices = judging.memory, judging.tiny, judging.choices  # fixtures
OPEN = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: {search: [0.1, 1]}}}
  - {model: b, parameters: {weight: {search: [0.1, 1]}}}
dtype: float32
"""


@pytest.fixture
def family(tmp_path: Path, tiny: Run, choices: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models a and b, choices.jsonl with 8 items, an open recipe; the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "a")
    tiny(tmp_path / "b", base=tmp_path / "a", delta=0.5, seed=1)
    (tmp_path / "open.yaml").write_text(OPEN)
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, [*words, "--cache", "answers.sqlite"], catch_exceptions=False)


def test_a_search_reports_what_its_recipe_gives_on_items_it_did_not_choose_by(family: Path, memory: Memory) -> None:
    asked = ("search", "open.yaml", "--tasks", "choices.jsonl", "--trials", "3", "-o", "found", "--quiet")
    first = run(*asked)
    assert first.exit_code == 0, first.output
    out = family / "found"
    data = json.loads((out / "trials.json").read_text())
    for sides in data["items"].values():
        assert not set(sides["search"]) & set(sides["report"])
        assert sorted(sides["search"] + sides["report"]) == list(range(8))
    report = load_results(out / "report.json")
    assert [model.name for model in report.models] == ["a", "b", "uniform average", "linear, defaults", "search"]
    assert all(list(model.tasks["choices"].doc_ids) == data["items"]["choices"]["report"] for model in report.models)
    # From the disk, with no answer known: the model in memory was this one.
    rest = Settings(holdout=0.5)
    again = evaluate(subjects([str(out / "best.yaml")]), resolve(["choices.jsonl"], None), rest, memory)
    assert again.models[0].asked > 0
    assert again.models[0].tasks["choices"].items == report.models[-1].tasks["choices"].items
    best = next(row for row in data["rows"] if row["name"] == data["best"])
    assert best["values"][0] == max(row["values"][0] for row in data["rows"] if row["recipe"])
    compared = CliRunner().invoke(cli, ["compare", str(out / "report.json"), "--merge", "search", "--parents", "a,b"])
    assert compared.exit_code == 0
    page = (out / "page.html").read_text()
    assert "<script" not in page
    assert "<h2>History</h2>" in page
    said = "# It was chosen on test sets of leaderboards: gsm8k."
    (family / "marked.yaml").write_text(f"{said}\n{(out / 'best.yaml').read_text()}")
    card = side_file_bytes(build_plan(load_recipe("marked.yaml")))["README.md"].decode()
    assert said in card
    assert "# The best of 3 trials of merge search on open.yaml: " in card
    before = {name: (out / name).read_bytes() for name in ("best.yaml", "trials.json", "report.json", "page.html")}
    assert run(*asked, "--resume").exit_code == 0
    for name in ("best.yaml", "page.html"):
        assert (out / name).read_bytes() == before[name]


def test_candidates_in_memory_answer_as_they_do_on_disk(family: Path, memory: Memory, tmp_path: Path) -> None:
    """Of the second and later ones only the weights are put into the model that was loaded."""
    (family / "text.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8\nw9 w10\n")
    tasks = resolve([], None, data=family / "text.txt")
    space = Space.load(family / "open.yaml")
    judge = TaskJudge(tasks, Settings(), memory, 0.5)
    scores = []
    for weight in (0.2, 0.6, 1.0, 0.2):
        recipe = space.recipe({"a.weight": weight, "b.weight": 0.5})
        scores.append(judge.scores(Candidate("candidate", recipe=recipe), {})["text"].value)
        (family / "plain.yaml").write_text(recipe.text)
        with Memory(tmp_path / f"other-{len(scores)}.sqlite") as fresh:
            found = evaluate(subjects(["plain.yaml"]), tasks, Settings(holdout=0.5, held_out=True), fresh)
        assert scores[-1] == pytest.approx(found.models[0].tasks["text"].value, rel=1e-6)
    assert len(set(scores)) == 3
    assert judge._live._places is not None


def test_what_a_search_is_not_asked_rightly_is_one_message(family: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises((UsageError, RecipeError)) as raised:
            run("search", *words)
        return str(raised.value)

    with pytest.raises(UsageError, match="gsm8k, mmlu_law: test sets of leaderboards"):
        refuse_test_sets([Task(name, name) for name in ("mine", "gsm8k", "mmlu_law")], False)
    assert refuse_test_sets([Task("gsm8k", "gsm8k")], True) == ("gsm8k",)
    assert refused("open.yaml", "-o", "x", "--tasks", "choices.jsonl", "--resume").endswith("to begin one.")
    (family / "full").mkdir()
    (family / "full" / "mine.txt").write_text("mine")
    assert "holds no search; nothing was changed" in refused("open.yaml", "-o", "full", "--tasks", "choices.jsonl")
    assert refused("open.yaml", "-o", "x", "--objective", "f.py") == '--objective "f.py": expected FILE.py:NAME.'
    assert refused("open.yaml", "-o", "x", "--objective", "f.py:f", "--data", "t") == (
        "--objective: cannot be combined with --data."
    )
    (family / "bad.yaml").write_text(OPEN.replace("[0.1, 1]", "[1, 0.1]"))
    assert refused("bad.yaml", "-o", "x", "--tasks", "choices.jsonl").count("bad.yaml:") == 2
    assert not (family / "x").exists()


def test_a_function_in_a_file_and_several_goals(family: Path) -> None:
    (family / "score.py").write_text(
        "def score(candidate):\n    x = candidate.values.get('a.weight', 0)\n    return {'p': x, 'q': 1 - x * x}\n"
        "score.tasks = ('p', 'q')\n"
    )
    asked = ("--objective", "score.py:score", "--goal", "pareto", "--trials", "4", "--quiet", "--json")
    found = run("search", "open.yaml", "-o", "found", *asked)
    data = json.loads(found.output)
    assert data["objectives"] == ["p", "q"]
    assert len(data["front"]) > 1
    assert "Pareto front" in (family / "found" / "page.html").read_text()


def test_an_interrupted_search_gives_the_best_so_far_and_is_resumed(family: Path) -> None:
    calls = 0

    def toy(candidate: Candidate) -> float:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return -abs(float(candidate.values.get("a.weight") or 0) - 0.5)

    space = Space.load(family / "open.yaml")
    found = search(space, toy, out=family / "out", trials=5)
    assert found.interrupted
    assert found.n_trials == 2
    assert found.recipe is not None
    resumed = search(space, toy, out=family / "out", trials=5)
    whole = search(space, toy, out=family / "whole", trials=5)
    assert [row.written for row in resumed.rows] == [row.written for row in whole.rows]


def test_the_least_divergence_from_a_model_is_that_of_the_model_itself(family: Path) -> None:
    (family / "text.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8\nw9 w10\nw2 w4\nw5 w3 w1\n")
    asked = ("--data", "text.txt", "--kl-from", "b", "--sampler", "grid", "--points", "2", "--quiet", "--json")
    found = run("search", "open.yaml", "-o", "found", *asked)
    rows = {row["name"]: row for row in json.loads(found.output)["rows"]}
    assert rows["b"]["scores"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows["a"]["scores"]["kl"] > 1e-4
    best = json.loads(found.output)["best"]
    assert rows[best]["places"] == {"a.weight": 0.1, "b.weight": 1.0}
    report = load_results(family / "found" / "report.json")
    expected = of_two_models(
        family / "b",
        family / "a",
        [(family / "text.txt").read_text().splitlines()[i] for i in report.models[0].tasks["kl"].doc_ids],
    )
    assert report.models[0].tasks["kl"].value == pytest.approx(expected, rel=1e-4)


def of_two_models(q: Path, p: Path, texts: list[str]) -> float:
    """Mean KL(q || p) of the next token, by transformers alone."""
    import torch

    from merge.loading import CAUSAL, load_model, load_tokenizer

    tokenizer = load_tokenizer(str(q))
    one, two = (load_model(CAUSAL, str(path), dtype=torch.float32).network.eval() for path in (q, p))
    total, n = 0.0, 0
    for text in texts:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False)["input_ids"]][:-1]])
        with torch.no_grad():
            a, b = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (one, two))
        total += float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum"))
        n += ids.shape[1]
    return total / n


GENOME = """\
genome:
  models: [a, b]
  merge_method: task_arithmetic
  base_model: a
  layer_granularity: 1
  normalize: false
  allow_negative_weights: true
  filters: [self_attn, mlp]
tasks:
  - {name: arc_easy, weight: 0.5, metric: "acc_norm,none"}
  - name: wikitext
    weight: -1
"""


def test_a_genome_of_mergekit_is_a_recipe_with_open_places(family: Path) -> None:
    file = family / "genome.yaml"
    file.write_text(GENOME)
    made = open_recipe(file)
    assert (made.tasks, made.weights) == (("arc_easy", "wikitext"), {"arc_easy": 0.5, "wikitext": -1.0})
    assert made.metrics == {"arc_easy": "acc_norm,none"}
    layers = json.loads((family / "a" / "config.json").read_text())["num_hidden_layers"]
    assert len(made.space.places) == 3 * layers
    assert {(place.low, place.high) for place in made.space.places} == {(-1.0, 1.0)}
    recipe = made.space.recipe({place.name: 0.5 for place in made.space.places})
    assert [piece.sources[1].layer_range for piece in recipe.slices] == [(i, i + 1) for i in range(layers)]
    file.write_text(GENOME.replace("  layer_granularity: 1\n", "").replace("task_arithmetic", "ties"))
    assert len(open_recipe(file).space.places) == 6
    for text, message in (
        ("genome:\n", "is empty"),
        ("genome: 3\n", "must be a mapping"),
        ("genome: {models: [a]}\n", "needs"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=rf"genome\.yaml:1: .genome. {message}"):
            open_recipe(file)
    file.write_text(GENOME.replace("allow_negative", "allow_negativ"))
    with pytest.raises(RecipeError, match=r"genome\.yaml:7: unknown key .allow_negativ_weights."):
        open_recipe(file)


def test_a_sweep_sets_every_value_of_a_name(family: Path) -> None:
    (family / "plain.yaml").write_text(OPEN.replace("{search: [0.1, 1]}", "0.5"))
    space = swept(family / "plain.yaml", [setting_of("weight=.2:1:5"), setting_of("normalize=true,false")])
    assert [(place.name, place.choices) for place in space.places] == [
        ("a.weight", (0.2, 0.4, 0.6, 0.8, 1.0)),
        ("normalize", (True, False)),
    ]
    recipe = space.recipe({"a.weight": 0.4, "normalize": False})
    assert [source.parameters["weight"] for source in recipe.models] == [0.4, 0.4]
    assert recipe.parameters["normalize"] is False
    assert len(points_of(space)) == 10
    one = swept(family / "plain.yaml", [setting_of("b.weight=0,1")])
    assert [place.name for place in one.places] == ["b.weight"]
    with pytest.raises(
        UsageError, match=r"--set wieght: is neither a value of the recipe nor a parameter; did you mean"
    ):
        swept(family / "plain.yaml", [setting_of("wieght=0,1")])
    for text in ("weight", "weight=1", "weight=1:2", "weight=0:1:1", "weight=1,1"):
        with pytest.raises(UsageError, match="expected NAME=LOW:HIGH:POINTS"):
            setting_of(text)


def test_a_sweep_is_a_curve_or_a_map_and_a_table(family: Path) -> None:
    (family / "plain.yaml").write_text(OPEN.replace("{search: [0.1, 1]}", "0.5"))
    asked = ("--tasks", "choices.jsonl", "--quiet", "--csv", "s.csv", "--html", "s.html")
    found = run("sweep", "plain.yaml", "--set", "a.weight=0.2,1", "--set", "dtype=float32,bfloat16", *asked)
    assert found.exit_code == 0, found.output
    lines = (family / "s.csv").read_text().splitlines()
    assert lines[0] == "a.weight,dtype,choices"
    assert [line.rpartition(",")[0] for line in lines[1:]] == [
        f"{x},{y}" for x in ("0.2", "1") for y in ("float32", "bfloat16")
    ]
    assert (family / "s.html").read_text().count("<rect") == 4
