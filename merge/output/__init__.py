"""Writes the result: shards, journal, manifest, model card, verification."""
