"""Carries out a plan: blocks, threads, memory, resume. Start with run.py."""
