"""Carries out the steps of a run in other processes: of this machine, or of a cluster by Ray. Start with pool.py."""
