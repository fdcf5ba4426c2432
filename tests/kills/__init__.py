"""Commands that are stopped at a chosen file-system call, and what has to be true afterwards."""
