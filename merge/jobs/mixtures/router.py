"""The router of a mixture of experts: one row for each expert in each layer, from prompts, random, or zero.

gate_mode as mergekit has it: hidden, hidden_avg, cheap_embed, random (normal), uniform_random (as torch begins a linear
layer); and zero, with which all experts have the same score until the router is trained.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from merge.checkpoint.files import read_json
from merge.errors import CheckpointError, MergeError, Problem, first_line
from merge.findings.router import RouterPrompts
from merge.moe_layouts import MoeLayout
from merge.plan import Derived, TensorRef
from merge.planning.inputs import Input
from merge.quoting import quoted
from merge.random_keys import random_key
from merge.recipe.keys import PROMPTED
from merge.recipe.model import Expert, Mixture, Recipe
from merge.sources import found

Tokens = tuple[tuple[int, ...], ...]  # of each prompt


class Router:
    """Makes the tensors of a layer's router.

    `gates` is what the run has to find for them first, `problems` what is wrong with the prompts.
    """

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        base: Input,
        layout: MoeLayout,
        n_layers: int,
    ) -> None:
        self._seed, self._mode, self._n = recipe.seed, mixture.gate_mode, len(mixture.experts)
        self._embedding = base.tensors["model.embed_tokens.weight"]
        self._hidden = self._embedding.shape[1]
        self.gates: RouterPrompts | None = None
        self.problems: list[Problem] = []
        self._rows: list[tuple[Tokens, Tokens]] = []
        if self._mode not in PROMPTED:
            return
        experts: list[Expert] = [*mixture.experts]
        if layout.shared_gate:
            experts.append(mixture.shared[0] if mixture.shared else Expert())
        prompts = _Prompts(base, self._embedding.shape[0], self.problems)
        self._rows = [
            (prompts.tokens(expert, expert.positive, recipe), prompts.tokens(expert, expert.negative, recipe))
            for expert in experts
        ]
        if self._mode != "cheap_embed":
            stack = base.main
            assert stack is not None
            layers: list[dict[str, TensorRef]] = [{} for _ in range(n_layers)]
            for name, ref in base.tensors.items():
                place = stack.layer(name)
                # The last layer's output feeds no router.
                if place is not None and place[0] < n_layers - 1 and not name.endswith("inv_freq"):
                    layers[place[0]][place[1]] = ref
            self.gates = RouterPrompts(
                model=0,
                average=self._mode == "hidden_avg",
                embedding=self._embedding,
                layers=tuple(layers),
                positive=tuple(positive for positive, _ in self._rows),
                negative=tuple(negative for _, negative in self._rows),
            )

    def gate(self, name: str, layer: int, dtype: str) -> TensorRef:
        """(experts, hidden)"""
        return self._made(name, layer, dtype, 0, self._n)

    def shared_gate(self, name: str, layer: int, dtype: str) -> TensorRef:
        """(1, hidden)"""
        return self._made(name, layer, dtype, self._n, 1)

    def _made(self, name: str, layer: int, dtype: str, first: int, n: int) -> TensorRef:
        """Rows first .. first + n of a layer's router."""
        called, shape = f"{name} ({self._mode})", (n, self._hidden)
        if self._mode == "zero":
            return Derived(called, dtype, shape, "zeros")
        if self._mode in ("random", "uniform_random"):
            normal = self._mode == "random"
            parameters: dict[str, Any] = {
                "key": random_key(self._seed, name, 0),
                "distribution": "normal" if normal else "uniform",
                "scale": 1.0 if normal else 1.0 / math.sqrt(self._hidden),
            }
            return Derived(called, dtype, shape, "random", (), parameters)
        if self._mode == "cheap_embed":
            rows = tuple((_counts(positive), _counts(negative)) for positive, negative in self._rows[first : first + n])
            return Derived(called, dtype, shape, "prompt_rows", (self._embedding,), {"rows": rows})
        return found(gate_key(layer), first * self._hidden, dtype, shape, called)


def gate_key(layer: int) -> str:
    """The key of the numbers that the run computes for a layer's router."""
    return f"gates {layer}"


def _counts(prompts: Tokens) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(Counter(token for prompt in prompts for token in prompt).items()))


class _Prompts:
    """Texts -> tokens of the base's tokenizer, with its first token before each and no other special ones."""

    def __init__(self, base: Input, vocabulary: int, problems: list[Problem]) -> None:
        self._base, self._vocabulary, self._problems = base, vocabulary, problems
        self._encode = _tokenizer(base.checkpoint.path)

    def tokens(self, expert: Expert, prompts: tuple[str, ...], recipe: Recipe) -> Tokens:
        all_tokens = []
        for prompt in prompts:
            tokens = self._encode(prompt)
            where = f"{recipe.file}:{expert.line}" if recipe.file else f"line {expert.line}"
            name = self._base.ref.text
            if not tokens:
                message = f"the prompt {quoted(prompt, 40)} has no token in {name}'s tokenizer."
                self._problems.append(Problem(message, where))
            elif max(tokens) >= self._vocabulary:
                message = f"{name}'s tokenizer has token {max(tokens)}, its embedding {self._vocabulary} rows."
                self._problems.append(Problem(message, where, "The tokenizer's files are of another model?"))
            else:
                all_tokens.append(tuple(tokens))
        return tuple(all_tokens)


def _tokenizer(path: str) -> Callable[[str], list[int]]:
    """tokenizer.json without transformers; other tokenizer files through transformers."""
    try:
        if os.path.isfile(file := os.path.join(path, "tokenizer.json")):
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(file)
            fast.no_truncation()
            fast.no_padding()
            begin = _first_token(path)
            return lambda text: list(fast.encode(begin + text, add_special_tokens=False).ids)
        from merge.loading import load_tokenizer

        slow = load_tokenizer(path)
        return lambda text: list(slow((slow.bos_token or "") + text, add_special_tokens=False)["input_ids"])
    except MergeError:
        raise
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded, and prompts need it ({first_line(error)})."
        ) from error


def _first_token(path: str) -> str:
    """bos_token of the tokenizer's config; "" if it has none"""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if os.path.isfile(file := os.path.join(path, name)):
            token = read_json(file, unique=False).get("bos_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                return text
    return ""
