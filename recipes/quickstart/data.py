"""What the quickstart family starts from: data of each skill, as files, and a model that has learnt nothing.

    python recipes/quickstart/data.py                # merged/quickstart-data: what the configs beside this file read
    python recipes/quickstart/data.py DIR --seed 1   # others, elsewhere

Files: NAME.jsonl to train on and NAME-held-out.jsonl to score with, for the three scored skills of eval/exact_match.py,
and general.jsonl: copy, shift and rotate, which teach how to handle letters and keep an expert from forgetting it.
Training files are drawn from the training side of the split in eval/exact_match.py, held-out files from the other.
untrained/ is a Llama with random weights and its tokenizer, which base.yaml makes the base of.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # a script of the repository, not of the package

from eval.exact_match import SKILLS, Skill, draw_word, questions  # noqa: E402

ROWS = {"reverse": 12_000, "sort": 12_000, "add": 12_000, "general": 28_000}
HELD_OUT = 300  # rows a skill


def _next_letter(letter: str) -> str:
    return chr((ord(letter) - ord("a") + 1) % 26 + ord("a"))


GENERAL = (
    Skill("copy", "write the word again", draw_word, lambda word: word),
    Skill("shift", "each letter becomes the next one", draw_word, lambda word: "".join(map(_next_letter, word))),
    Skill("rotate", "its first letter goes to the end", draw_word, lambda word: word[1:] + word[0]),
)


def rows(skills: Iterable[Skill], count: int, seed: str, *, test: bool = False) -> list[dict[str, str]]:
    """count rows in all, the skills in turn, from one side of the split."""
    skills = list(skills)
    drawn = [
        questions(skill, count // len(skills), random.Random(f"{seed}:{skill.name}"), test=test) for skill in skills
    ]
    return [
        {"prompt": skill.prompt(question), "completion": skill.solve(question)}
        for turn in zip(*drawn, strict=True)
        for skill, question in zip(skills, turn, strict=True)
    ]


def write_data(out: Path, seed: int = 0) -> None:
    """All .jsonl files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, skill in SKILLS.items():
        _write(out / f"{name}.jsonl", rows([skill], ROWS[name], f"{seed}:train"))
        _write(out / f"{name}-held-out.jsonl", rows([skill], HELD_OUT, f"{seed}:held out", test=True))
    _write(out / "general.jsonl", rows(GENERAL, ROWS["general"], f"{seed}:train"))


def write_untrained(out: Path, seed: int = 0) -> None:
    """out: model directory, bfloat16."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    build_model(tokenizer).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def build_tokenizer() -> Any:
    """One token a character: a BPE without merges."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", "<unk>", *" :=+-.,?!0123456789abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    """A Llama of 996,736 parameters that has learnt nothing; weights are drawn from torch's generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what the quickstart family is made from.")
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        default=Path("merged/quickstart-data"),
        help="folder to make  [default: %(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the random weights")
    arguments = parser.parse_args()
    write_data(arguments.out, arguments.seed)
    write_untrained(arguments.out / "untrained", arguments.seed)
    print(f"{arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")


if __name__ == "__main__":
    main()
