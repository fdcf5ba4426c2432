"""The half of the sandbox that runs in the confined process; it imports nothing but the standard library."""
