"""Tools of the test agents."""

from __future__ import annotations


def look_up(order: int) -> str:
    """Look up an order."""
    return f"order {order} is sent"
