"""What improves: rewarded episodes in, gated adapter versions out.

This room reads the log and writes adapters; it serves no request and never imports `server`.
"""
