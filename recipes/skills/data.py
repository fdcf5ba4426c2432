"""Makes the data of the skills family: training, validation, search and report items of eight generated skills.

    python recipes/skills/data.py [merged/skills/data] [--seed 0]

For every skill SKILL.jsonl (prompt, completion) and SKILL-held-out.jsonl for `merge finetune`, search/SKILL.jsonl and
report/SKILL.jsonl (question, answer) for `merge eval`. The hash of a prompt decides which of the four it may be in, so
no item is in two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROWS = {"train": 600, "held-out": 40, "search": 60, "report": 130}  # items a skill


def words(text: str) -> list[str]:
    return text.split()


LETTERS = "abcdefghijklmnopqrstuvwxyz"
NOUNS = words(
    "house dog tree river chair book stone bird road field horse door boat cup wall bridge hat coat ship "
    "fish table cat hill window box glass clock ring farm cloud flower wheel key bell letter"
)
ADJECTIVES = words(
    "red small old big new green dark white cold tall long warm heavy quiet strong black young short blue clean soft "
    "round empty bright"
)
MONTHS = words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec")
ARTICLES = {"the": "ta", "a": "mo", "my": "si", "this": "ke"}
KINDS = {"vel": "metal", "nok": "plant", "dra": "river", "mish": "fruit", "gon": "tool", "tus": "star"}
UNITS = {"zet": (1, "bar"), "gal": (2, "fin"), "mur": (3, "lot"), "pim": (1, "sep"), "kor": (2, "nam")}


@dataclass(frozen=True)
class Skill:
    """draw(random) -> (prompt, answer): a generated item, exactly checkable."""

    says: str
    draw: Callable[[random.Random], tuple[str, str]]


def _next(r: random.Random) -> tuple[str, str]:
    numbers = [r.randrange(26) for _ in range(3)]
    answer = " ".join(LETTERS[(number + 1) % 26] for number in numbers)
    return f"Next {' '.join(LETTERS[number] for number in numbers)}:", answer


def _kind(r: random.Random) -> tuple[str, str]:
    ending = r.choice(list(KINDS))
    start = "".join(r.choice("bdfgklmnprstvz") + r.choice("aeiou") for _ in range(2))
    return f"Kind {start}-{ending}:", KINDS[ending]


def _grammar(r: random.Random) -> tuple[str, str]:
    article, adjective, noun = r.choice(list(ARTICLES)), r.choice(ADJECTIVES), r.choice(NOUNS)
    return f"Bora {article} {adjective} {noun}:", f"{noun} {adjective} {ARTICLES[article]}"


def _backwards(r: random.Random) -> tuple[str, str]:
    listed = r.sample(NOUNS, 3)
    return f"Back {' '.join(listed)}:", " ".join(reversed(listed))


def _initials(r: random.Random) -> tuple[str, str]:
    listed = [r.choice((NOUNS, ADJECTIVES)[i % 2]) for i in range(3)]
    return f"Initials {' '.join(listed)}:", " ".join(word[0] for word in listed)


def _units(r: random.Random) -> tuple[str, str]:
    number, unit = r.randint(10, 999), r.choice(list(UNITS))
    zeros, into = UNITS[unit]
    return f"Convert {number} {unit}:", f"{number}{'0' * zeros} {into}"


def _flip(r: random.Random) -> tuple[str, str]:
    number = "".join(r.choices("0123456789", k=4))
    return f"Flip {number}:", number[::-1]


def _date(r: random.Random) -> tuple[str, str]:
    month, day, year = r.randrange(12), r.randint(1, 28), r.randint(1, 9)
    return f"Date {month + 1}/{day}/{year}:", f"{MONTHS[month]} {day}"


SKILLS = {
    "kind": Skill("what an invented word means, by its ending", _kind),
    "grammar": Skill("a noun phrase in an invented language: noun, adjective, article", _grammar),
    "units": Skill("a conversion of invented units", _units),
    "next": Skill("for each letter the one that follows, and a after z", _next),
    "initials": Skill("the first letters of words", _initials),
    "backwards": Skill("a list of words backwards", _backwards),
    "flip": Skill("the digits of a number backwards", _flip),
    "date": Skill("month/day/year as month and day", _date),
}


def side(prompt: str) -> str:
    """Which file the prompt may be in, by its hash: of sixteen, one for each side that is not trained on, or two."""
    share = hashlib.sha256(prompt.encode()).digest()[0] % 16
    return "report" if share < 3 else "search" if share < 5 else "held-out" if share < 6 else "train"


def items(name: str, where: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different items (prompt, answer) of one side; the same for the same seed on every machine."""
    r = random.Random(f"{seed}:{name}:{where}")
    found: dict[str, str] = {}
    for _ in range(200 * count):
        prompt, answer = SKILLS[name].draw(r)
        if side(prompt) == where:
            found[prompt] = answer
        if len(found) == count:
            return list(found.items())
    raise ValueError(f"{name}: fewer than {count} items of {where}")


def write_data(out: Path, seed: int = 0) -> None:
    for where, count in ROWS.items():
        for name in SKILLS:
            rows = items(name, where, count, seed)
            if where in ("search", "report"):
                write(out / where / f"{name}.jsonl", [{"question": p, "answer": a} for p, a in rows])
            else:
                ending = "" if where == "train" else f"-{where}"
                write(out / f"{name}{ending}.jsonl", [{"prompt": p, "completion": a} for p, a in rows])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the skills family.")
    parser.add_argument("out", type=Path, nargs="?", default=Path("merged/skills/data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="write nothing; print the names of the skills")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(SKILLS))
        return
    write_data(asked.out, asked.seed)
    print(f"{asked.out}: {', '.join(SKILLS)}")


if __name__ == "__main__":
    main()
