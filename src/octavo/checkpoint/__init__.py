"""Checkpoints as files: headers, accounting and what is done shard by shard. Nothing here imports transformers."""
