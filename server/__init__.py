"""The face: OpenAI wire shapes, agent runs, tools, releases in traffic, the CLI.

This room wires the others together and serves; it never trains and never imports `trainer`.
"""
