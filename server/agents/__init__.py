"""Agents: the file that an owner writes, and the loop that lets a policy act with its tools.

Knows nothing of HTTP routes, SQL or training; engine, chat format and recorder are passed in.
"""
