"""Mixtures of experts out of dense models."""
