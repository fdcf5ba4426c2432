"""Recipes of mixtures of experts."""

from __future__ import annotations

from fuzz import recipes

SOUND = (
    "base_model: a\ngate_mode: random\ndtype: float32\nexperts: [{source_model: a}, {source_model: b}]\n",
    "base_model: a\ngate_mode: zero\nexperts_per_token: 1\nreinit: {ratio: 0.5}\nseed: 1\n"
    "experts: [{source_model: a, noise_scale: 0.1}, {source_model: b, residual_scale: 0.5}]\nattention: average\n",
    "base_model: a\ngate_mode: uniform_random\narchitecture: mixtral\nexperts: [{source_model: b}, {source_model: b}]\n"
    "attention: {merge_method: ties, parameters: {density: 0.5, weight: 1}}\n",
    "base_model: a\ngate_mode: random\narchitecture: deepseek\nexperts: [{source_model: a}, {source_model: b}]\n"
    "shared_experts: [{source_model: a}]\n",
    "base_model: a\ngate_mode: cheap_embed\nexperts: [{source_model: a, positive_prompts: [x]}, "
    "{source_model: b, positive_prompts: [y], negative_prompts: [z]}]\n",
)


class Format(recipes.Format):
    texts = SOUND
