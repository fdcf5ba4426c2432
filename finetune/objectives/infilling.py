"""Infilling: trains a model to write the middle of a text, given its beginning and end.

Source: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle" (arXiv:2207.14255). A text
is cut at two places drawn uniformly among its characters (section 3: characters, not tokens, so that models cope with
broken words) and rearranged, prefix-suffix-middle:

    <PRE> prefix <SUF> suffix <MID> middle <end>

A share `infilling_rate` of the texts is rearranged, the others stay as they are (the paper: 0.5 to 0.9 cost nothing in
left-to-right loss). All tokens count, as in the paper. Long texts are split before they are cut (context-level, section
4.4), so a middle never loses its prefix. Validation rearranges every text and measures the middle alone.
"""

from __future__ import annotations

import random
from typing import Self

import numpy as np

from finetune.data.contents import Sample, Text
from finetune.data.encode import Encoded, Encoder, Example
from finetune.objectives.base import Run
from finetune.objectives.causal import Causal
from merge.errors import UsageError
from merge.schema.names import suggest

# (prefix, suffix, middle) of the tokenizers of Qwen and Gemma, StarCoder, SantaCoder, DeepSeek and Code Llama.
KNOWN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
_SPARE = 8  # the marks, and tokens that result from cutting inside one


class Infilling(Causal):
    takes = (Text,)
    too_long = "split"

    def __init__(self, marks: tuple[int, ...] = ()) -> None:
        self._marks = marks

    def bind(self, run: Run) -> Self:
        known, named = run.tokenizer.get_vocab(), run.config.infilling_tokens
        if named:
            if len(named) != 3 or len(set(named)) != 3:
                raise UsageError(
                    f"infilling_tokens: must be three tokens, for prefix, suffix and middle; found {', '.join(named)}."
                )
            for word in named:
                if word not in known:
                    raise UsageError(
                        f'infilling_tokens: "{word}" is not in the vocabulary; '
                        f"{suggest(word, run.tokenizer.all_special_tokens)}. Name tokens it has, or add them: "
                        "new_tokens."
                    )
        chosen = named or next((words for words in KNOWN if all(word in known for word in words)), ())
        if not chosen:
            raise UsageError(
                "the tokenizer has no tokens for infilling. Name three of its tokens with infilling_tokens: "
                f"[prefix, suffix, middle], or add some: new_tokens: [{', '.join(map(repr, KNOWN[0]))}]."
            )
        if (run.config.max_length or 1 << 30) < 2 * _SPARE:
            raise UsageError(f"max_length: infilling needs at least {2 * _SPARE} tokens.")
        return type(self)(tuple(known[word] for word in chosen))

    def record(self) -> dict[str, object]:
        return {"infilling_token_ids": list(self._marks)}

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        assert isinstance(sample.content, Text)
        config, text = encoder.config, sample.content.text
        wanted = config.too_long or self.too_long
        pieces = encoder.pieces(text, encoder.max_length - _SPARE) if wanted == "split" else [text]
        examples: list[Example] = []
        for number, piece in enumerate(pieces):
            draw = random.Random(f"{config.seed}:infilling:{number}:{piece}")
            moved = draw.random() < config.infilling_rate or encoder.held_out
            ids, weights = self._rearranged(piece, encoder, draw) if moved else encoder.text(piece)
            if len(ids) > encoder.max_length and wanted == "split":  # cutting inside tokens made more tokens
                if encoder.held_out:
                    continue
                ids, weights = encoder.text(piece)
            examples += encoder.fit(ids, weights, sample.place, sample.task, wanted)
        return examples

    def _rearranged(self, text: str, encoder: Encoder, draw: random.Random) -> Encoded:
        first, second = sorted(draw.randint(0, len(text)) for _ in range(2))
        prefix, suffix, middle = self._marks
        opening, end = encoder.opening, encoder.tokenizer.eos_token_id
        before = [*opening, prefix, *encoder.bare(text[:first]), suffix, *encoder.bare(text[second:]), middle]
        after = encoder.bare(text[first:second]) + ([] if end is None else [end])
        weights = np.ones(len(before) + len(after), np.float32)
        weights[: len(before) if encoder.held_out else 1] = 0
        return np.array(before + after, np.int32), weights


OBJECTIVE = Infilling()
