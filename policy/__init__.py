"""What acts: the engine, the chat format, adapters and their releases.

This room turns token ids into token ids under a named adapter version, and keeps those versions.
It knows nothing of rewards, of HTTP, or of how episodes are stored.
"""
