"""The HTTP routes that are Hone's own; those of plain generation are vLLM's."""
