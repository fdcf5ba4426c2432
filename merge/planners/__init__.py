"""Recipe and headers to Plan: each output tensor's sources, method, parameters and offset."""
