"""Made-up rows in the schemas of the leaderboards' datasets, in place of the hub: load_dataset(path, name)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.tasks.leaderboards import MUSR

Rows = list[dict[str, Any]]
_WORDS = ["red", "green", "blue", "stone", "river", "cat", "dog", "seven", "nine", "tall", "old", "quick"]
_LETTERS = "ABCDEFGHIJKLMNOPQRST"


def load_dataset(path: str, name: str | None = None, *, rows: int = 3, **_: Any) -> Any:
    """What datasets.load_dataset gives of a leaderboard's dataset, with a few made-up rows in each split."""
    import datasets

    draw = random.Random(f"{path} {name}")
    splits = _SCHEMAS[path](draw, name, rows)
    return datasets.DatasetDict({split: datasets.Dataset.from_list(made) for split, made in splits.items()})


def _text(draw: random.Random, least: int = 2, most: int = 8) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))


def _texts(draw: random.Random, n: int) -> list[str]:
    return [f"{_text(draw, 1, 3)} {place}" for place in range(n)]  # all different


def _made(draw: random.Random, n: int, one: Callable[[], dict[str, Any]], splits: Sequence[str]) -> dict[str, Rows]:
    return {split: [one() for _ in range(n)] for split in splits}


def _arc(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        choices = {"text": _texts(draw, 4), "label": list("ABCD")}
        return {"question": _text(draw), "choices": choices, "answerKey": draw.choice("ABCD")}

    # 25 shots are drawn from train.
    return _made(draw, 30, one, ["train"]) | _made(draw, n, one, ["validation", "test"])


def _hellaswag(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        row = {"activity_label": _text(draw, 1, 2), "ctx_a": _text(draw), "ctx_b": _text(draw, 1, 2)}
        return row | {"endings": [f"{text} [title] end" for text in _texts(draw, 4)], "label": str(draw.randrange(4))}

    return _made(draw, 12, one, ["train"]) | _made(draw, n, one, ["validation"])


def _mmlu(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        return {"question": _text(draw), "choices": _texts(draw, 4), "answer": draw.randrange(4)}

    # Subjects differ in size, so that a mean over them is not one over items.
    return _made(draw, 5, one, ["dev"]) | _made(draw, n + len(str(name)) % 3, one, ["test"])


def _truthful(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        targets = {"choices": _texts(draw, 5), "labels": [1, 1, 0, 0, 0]}
        return {"question": _text(draw), "mc1_targets": targets, "mc2_targets": targets}

    return _made(draw, n, one, ["validation"])


def _winogrande(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        first, second = _texts(draw, 2)
        sentence = f"{_text(draw)} _ {_text(draw)}."
        return {"sentence": sentence, "option1": first, "option2": second, "answer": draw.choice("12")}

    return _made(draw, 8, one, ["train"]) | _made(draw, n, one, ["validation"])


def _gsm8k(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        return {"question": _text(draw), "answer": f"{_text(draw)}\n#### {draw.randrange(9)}"}

    return _made(draw, 8, one, ["train"]) | _made(draw, n, one, ["test"])


def _bbh(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    choices = _bbh_choices(str(name))

    def one() -> dict[str, Any]:
        return {"input": _text(draw), "target": draw.choice(choices)}

    return _made(draw, n + len(str(name)) % 3, one, ["test"])


def _bbh_choices(name: str) -> list[str]:
    """The answers that lm-eval's task has."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "bbh_mc"
    found = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["doc_to_choice"]
    return [str(choice) for choice in found]


def _musr(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one(k: int) -> dict[str, Any]:
        choices = _texts(draw, k)
        answer = draw.choice(choices)
        return {"narrative": _text(draw), "question": _text(draw), "choices": repr(choices), "answer_choice": answer}

    return {split: [one(k) for _ in range(n + place)] for place, (split, k) in enumerate(MUSR.items())}


def _gpqa(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        right, *wrong = _texts(draw, 4)
        return {"Question": _text(draw), "Correct Answer": right} | {
            f"Incorrect Answer {place}": text for place, text in enumerate(wrong, 1)
        }

    return _made(draw, n + len(str(name)) % 4, one, ["train"])


def _mmlu_pro(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one() -> dict[str, Any]:
        options = _texts(draw, draw.randint(4, 10))
        return {"question": _text(draw), "options": options, "answer": _LETTERS[draw.randrange(len(options))]}

    return _made(draw, 6, one, ["validation"]) | _made(draw, n, one, ["test"])


def _math(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    def one(level: int = 5) -> dict[str, Any]:
        solution = f"{_text(draw)} $\\boxed{{{draw.randrange(9)}}}$"
        return {"problem": _text(draw), "level": f"Level {level}", "solution": solution, "type": str(name)}

    tested = [one() for _ in range(n + len(str(name)) % 3)] + [one(4)]  # only level 5 is asked
    return {"train": [one() for _ in range(4)], "test": tested}


def _ifeval(draw: random.Random, name: str | None, n: int) -> dict[str, Rows]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("punctuation:no_comma", {}),
        ("change_case:english_lowercase", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 40}),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 4}),
    ]
    keys = ("relation", "num_words", "num_sentences")

    def one(key: int) -> dict[str, Any]:
        chosen = draw.sample(kinds, draw.randint(1, 3))
        settings = [{key: given.get(key) for key in keys} for _, given in chosen]
        return {"key": key, "prompt": _text(draw), "instruction_id_list": [k for k, _ in chosen], "kwargs": settings}

    return {"train": [one(key) for key in range(n)]}


_SCHEMAS: dict[str, Callable[[random.Random, str | None, int], dict[str, Rows]]] = {
    "allenai/ai2_arc": _arc,
    "Rowan/hellaswag": _hellaswag,
    "cais/mmlu": _mmlu,
    "truthfulqa/truthful_qa": _truthful,
    "allenai/winogrande": _winogrande,
    "openai/gsm8k": _gsm8k,
    "SaylorTwift/bbh": _bbh,
    "TAUR-Lab/MuSR": _musr,
    "Idavidrein/gpqa": _gpqa,
    "TIGER-Lab/MMLU-Pro": _mmlu_pro,
    "DigitalLearningGmbH/MATH-lighteval": _math,
    "wis-k/instruction-following-eval": _ifeval,
}
