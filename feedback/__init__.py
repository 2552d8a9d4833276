"""What happened and how good it was: episodes, turns, feedback events, reward specs, the store.

This room imports neither torch nor vllm: it must open in milliseconds wherever outcomes arrive.
"""
