"""Which sequences run, on which KV blocks. Nothing in this room imports torch."""
