"""Plans mixtures of experts made from dense models."""
