"""Tests, before any layer is read, whether and how a model can be run layer by layer.

In a trial the layers only add a number, so it takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, first_line

if TYPE_CHECKING:
    from merge.layerwise.runner import LayerRunner

# A layer may return the hidden state, or a tuple that begins with it.
FORMS: tuple[Callable[[Any], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
)


class Unstreamable(Exception):
    """Raised with the reason why a model cannot be run layer by layer."""


def find_form(runner: LayerRunner) -> None:
    """Sets `form` and `needs_embedding`. Raises Unstreamable."""
    reason = None
    for form in FORMS:
        runner.form = form
        try:
            one, two = runner.trial(0.5), runner.trial(0.25)
            break
        except Unstreamable as error:
            reason = reason or error
        except (MergeError, MemoryError):
            raise
        except Exception as error:  # any error of a wrong form
            reason = reason or Unstreamable(f"its layers do not simply follow each other ({first_line(error)})")
    else:
        assert reason is not None
        raise reason
    if not _same(one, two):
        raise Unstreamable("its layers need more from earlier layers than the hidden state")
    shared = {type(each).__name__ for each in _parts(one) if _holds_state(each)}
    if shared and getattr(runner.model.config.get_text_config(), "num_kv_shared_layers", None) != 0:
        raise Unstreamable(f"its layers share a {min(shared)}")
    runner.needs_embedding = not _same(one, runner.trial(0.5, blank=True))


def check_end(runner: LayerRunner) -> None:
    """Raises Unstreamable unless the part after the layers can run with a few rows of the head at a time."""
    import torch

    tokens = runner.trial_tokens
    hidden = runner.embed(tokens)
    # After a single layer, no other shows which outputs are accepted.
    for form in FORMS if len(runner.layers) == 1 else (runner.form,):
        runner.form = form
        try:
            found = []
            for rows in (1, 2):
                runner.load_head(0, rows)
                found.append(runner.finish(tokens, hidden))
        except (MergeError, MemoryError):
            raise
        except Exception as error:
            reason = first_line(error)
            continue
        one, two = found
        if two.shape == (*tokens.shape, 2) and torch.allclose(one, two[..., :1], rtol=1e-3, atol=1e-6, equal_nan=True):
            return
        reason = "a token's logit depends on other tokens'"
    raise Unstreamable(f"the part after its layers cannot be run separately ({reason})")


def _same(one: Any, two: Any) -> bool:
    import torch

    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return bool(one.shape == two.shape and torch.equal(one, two))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return not isinstance(one, (int, float, str)) or bool(one == two)


def _parts(value: object) -> Iterator[object]:
    """Values at any depth of lists and mappings, and empty mappings."""
    if isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and value):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(each)
    else:
        yield value


def _holds_state(value: object) -> bool:
    """Whether a layer may store something there for later ones."""
    return isinstance(value, Mapping) or hasattr(value, "get_seq_length")
