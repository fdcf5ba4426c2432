"""What mergekit's schema has and this version does not do: refused by name, never ignored.

Everything here is parsed first, so that the refusal names the right line. To build a feature, delete its lines here.
"""

from __future__ import annotations

_LATER = "with a later version; nothing was merged"

MIXTURE_KEYS = ("experts", "shared_experts", "gate_mode", "experts_per_token")  # another schema: refused alone
MIXTURE = f"mixtures of experts come {_LATER}"

# Keys that only a refusal reads, by the level they stand at.
KEYS: dict[str, dict[str, str]] = {
    "slice": {
        "residual_weight": "residual_weight has no effect in mergekit and none here; remove it",
    },
}
