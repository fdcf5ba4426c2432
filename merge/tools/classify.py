"""The probabilities of a sequence classifier's labels for texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge.errors import UsageError
from merge.tools.loaded import OpenedModel


def classify(
    loaded: OpenedModel, texts: Sequence[str], batch: int = 16, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, float]]:
    """For each text, the probability of each label, the most likely first.

    One label: sigmoid of its logit. A config with problem_type multi_label_classification: sigmoids; else softmax.
    Texts longer than the model's context are cut, with a note through `say`.

    Raises:
        UsageError: a text without a token.
    """
    import torch

    network, tokenizer = loaded.network, loaded.tokenizer
    names = {int(i): str(label) for i, label in network.config.id2label.items()}
    independent = len(names) == 1 or network.config.problem_type == "multi_label_classification"
    if tokenizer.pad_token is None or network.config.pad_token_id is None:
        batch = 1  # without padding every text is on its own
    most = min(tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", 1 << 30))
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    if not all(lengths):
        raise UsageError(f"text {lengths.index(0) + 1}: expected some text, found none.")
    if cut := sum(length > most for length in lengths):
        say(f"note: {cut:,} of {len(texts):,} texts are longer than the model's {most:,} tokens, and are cut")
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            part = list(texts[start : start + batch])
            tokens = tokenizer(part, return_tensors="pt", padding=batch > 1, truncation=True, max_length=most)
            tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            logits = network(**tokens).logits.float()
            shares = logits.sigmoid() if independent else logits.softmax(-1)
            for row in shares.tolist():
                ranked = sorted(enumerate(row), key=lambda item: (-item[1], item[0]))
                found.append({names[i]: share for i, share in ranked})
    return found
