"""Checks that a language model predicts each token only from earlier tokens.

A model that sees the token itself, as BERT does, has a meaningless perplexity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig


def check_causal(config: PreTrainedConfig, path: str) -> None:
    """Raises CheckpointError for a config whose model attends to later tokens."""
    if reason := _why_not(config):
        raise _error(path, reason)


def check_sees_no_later(network: Module, path: str) -> None:
    """Runs a model on two texts that differ only in their last token; predictions before it must be equal.

    Raises:
        CheckpointError: they do.
    """
    import torch

    with torch.no_grad():
        logits = network(input_ids=alike_but_for_the_last(network), use_cache=False).logits.float()
    check_alike(logits, path)


def alike_but_for_the_last(network: Module) -> Tensor:
    """Two sequences of tokens (2, 6) that differ in the last token."""
    import torch

    return torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]]) % network.get_input_embeddings().num_embeddings


def check_alike(values: Tensor, path: str) -> None:
    """Raises CheckpointError if a model's outputs for them, (..., 2, 6, n), differ before the last token."""
    import torch

    one, two = values[..., 0, :-1, :], values[..., 1, :-1, :]
    # Rounding may depend on the row; a token that is seen changes more than this. NaN is for those who use the numbers.
    largest = float(one.nan_to_num().abs().max())
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3 * largest, equal_nan=True):
        raise _error(path, "its predictions depend on later tokens")


def _why_not(config: PreTrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    text = config.get_text_config()
    first = (getattr(config, "architectures", None) or [""])[0]
    if str(first).endswith("ForMaskedLM"):
        return f"it is a {first}, which fills gaps"
    if getattr(text, "is_causal", True) is False:
        return 'its config says "is_causal": false'
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return f'its config says "use_bidirectional_attention": {text.use_bidirectional_attention}'
    fills = getattr(text, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills and not getattr(text, "is_decoder", True) and not getattr(text, "is_encoder_decoder", False):
        return f'an encoder ("{text.model_type}" without "is_decoder": true in its config) sees both sides'
    return None


def _error(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is not a causal language model ({reason}), so it cannot continue a text, and its perplexity would "
        "mean nothing. Name a model that predicts each token from those before it."
    )
