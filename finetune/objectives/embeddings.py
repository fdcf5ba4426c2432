"""Sentence embeddings: moves matching texts together, and other texts of the batch apart.

The embedding of a text is the mean of its last hidden states, scaled to length 1 (Reimers and Gurevych 2019,
arXiv:1908.10084, section 3). The loss is cross entropy over cosines, divided by a temperature, of an anchor with the
positives of the whole batch; its own is the right one (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Henderson et
al. 2017, arXiv:1705.00652, section 4.4). Rejected texts, where the data has them, are further wrong answers for all.

A positive that equals the row's own, or that belongs to the same anchor, is not taken for a wrong answer. Negatives
come of one batch (of one process): a larger batch_size makes a harder task, gradient_accumulation does not.

The result loads in sentence-transformers as it is: modules.json names mean pooling and normalisation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from finetune.data.contents import Preference, Sample, TextPair
from finetune.data.encode import Encoder, Example
from finetune.data.pack import Batch, BatchRow
from finetune.keys import Config
from finetune.objectives.base import Objective, Run, inputs_of, model_inputs
from merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCK = 1024  # anchors that are compared with all positives at once, in metrics


class Embeddings(Objective):
    takes = (TextPair, Preference)
    too_long = "error"
    model_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"
    pipeline = "sentence-similarity"
    unit = "an example"
    by_token = False
    prompts = False

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()

    def bind(self, run: Run) -> Self:
        kinds = {type(sample.content) for sample in (*run.train, *run.validation)}
        if len(kinds) > 1:
            raise UsageError(
                "embeddings: some data has rejected texts and some has not; give all of them one, or none."
            )
        if run.config.batch_size < 2 and TextPair in kinds:
            raise UsageError("batch_size: 1 leaves nothing to compare an anchor with; set at least 2, better 32.")
        return type(self)(run.config)

    def encode(self, sample: Sample, encoder: Encoder) -> list[Example]:
        """One example: anchor, positive, and a negative if there is one."""
        content = sample.content
        if isinstance(content, TextPair):
            texts = [content.prompt, content.completion]
        else:
            assert isinstance(content, Preference)
            texts = [text for text in (content.prompt, content.chosen, content.rejected) if isinstance(text, str)]
            if len(texts) < 3:
                raise UsageError(f"data {sample.place}: embeddings takes texts, found a conversation.")
        parts = []
        for text in texts:
            ids = encoder.marked(text, encoder.config.too_long or self.too_long)
            if ids is None:
                return []
            if not text.strip():
                raise UsageError(f"data {sample.place}: a text is empty, so it has no embedding. Remove the example.")
            parts.append(ids)
        joined = np.concatenate(parts)
        starts = tuple(int(at) for at in np.cumsum([len(part) for part in parts])[:-1])
        return [Example(joined, np.zeros(len(joined), np.float32), sample.place, sample.task, starts=starts)]

    def collate(self, rows: Sequence[BatchRow], pad: int) -> Batch:
        """Anchors, positives, then negatives: input_ids, attention_mask (2 or 3 row, token) int64; wrong (row, answer)
        bool: answers that are to be told apart from the row's own, which is answer `row`."""
        import torch

        numbers, examples = zip(*(item for row in rows for item in row.examples), strict=True)
        parts = [[ids for ids, _ in example.sequences] for example in examples]
        columns = [list(column) for column in zip(*parts, strict=True)]
        anchors = [ids.tobytes() for ids in columns[0]]
        answers = [ids.tobytes() for column in columns[1:] for ids in column]
        n = len(examples)
        wrong = torch.tensor(
            [
                [
                    answer != answers[row] and not (column < n and anchors[column] == anchors[row])
                    for column, answer in enumerate(answers)
                ]
                for row in range(n)
            ]
        )
        ids = inputs_of([one for column in columns for one in column], pad)
        return {**ids, "wrong": wrong, "examples": list(numbers)}

    def weights(self, batch: Batch) -> Tensor:
        import torch

        return torch.ones(len(batch["wrong"]), device=batch["wrong"].device)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        vectors = embed(model, batch)
        n = len(batch["wrong"])
        logits = vectors[:n] @ vectors[n:].T / self._config.similarity_temperature
        own = torch.eye(n, logits.shape[1], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(batch["wrong"] | own), -torch.inf)
        losses = torch.nn.functional.cross_entropy(logits, torch.arange(n, device=logits.device), reduction="none")
        return losses, torch.cat([vectors[:n], vectors[n : 2 * n]], 1).detach()

    def metrics(self, columns: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Over the whole validation set: how often an anchor's own positive is the nearest, and its mean reciprocal
        rank. Equal positives count as one."""
        import torch

        anchors, positives = columns.chunk(2, 1)
        texts = [example.sequences[1][0].tobytes() for example in examples]
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        own = torch.tensor([numbers[text] for text in texts])
        answers = positives[[texts.index(text) for text in numbers]]
        ranks = []
        for start in range(0, len(anchors), _BLOCK):
            part = slice(start, start + _BLOCK)
            cosines = anchors[part] @ answers.T
            ranks.append(1 + (cosines > cosines.gather(1, own[part, None])).sum(1))
        rank = torch.cat(ranks).double()
        return {"accuracy": float((rank == 1).double().mean()), "reciprocal_rank": float((1 / rank).mean())}

    def finish(self, folder: Path, model: nn.Module) -> None:
        """Writes the files that make a model or PEFT adapter loadable by sentence-transformers."""
        if self._config.train == "bottleneck":  # which it cannot load
            return
        write_sentence_transformer(folder, model.config.get_text_config().hidden_size, self._config.max_length)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """(text, hidden) float32 of length 1."""
    import torch

    states = model(**model_inputs(batch)).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def write_sentence_transformer(folder: Path, width: int, max_length: int | None) -> None:
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    files: dict[str, object] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": pooling,
    }
    for path, _ in kinds[1:]:
        (folder / path).mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


OBJECTIVE = Embeddings()
