"""`--show N`: prints examples as the model will see them, with the loss mask in colour.

Green counts fully, yellow in part (prompt_loss_weight), grey not at all. Without colours the weights are written out:
[0.1|prompt][1|response].
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from finetune.data.encode import Example

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

_STYLES = {0.0: "bright_black", 1.0: "green"}


def show_examples(examples: list[Example], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Prints examples on a rich console."""
    from rich.text import Text

    for example in examples:
        counted = int((example.weights > 0).sum())
        learnt = f"{counted} in the loss" if example.label is None else f"label {example.label}"
        learnt = f", {learnt}" if counted or example.label is not None else ""  # embeddings have no weights
        console.print(f"{example.place}: {len(example)} tokens{learnt}", style="bold")
        line = Text()
        for weight, run in itertools.groupby(range(len(example)), key=lambda i: round(float(example.weights[i]), 6)):
            text = tokenizer.decode([int(example.ids[i]) for i in run], skip_special_tokens=False)
            text = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
            if console.color_system is None:
                line.append(f"[{weight:g}|{text}]")
            else:
                line.append(text, style=_STYLES.get(weight, "yellow"))
        console.print(line)
