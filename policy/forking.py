"""Says when a fork is not safe. What forks, and what to do about it, is the caller's.

A forked process has the forking thread only: a lock that another one held then stays locked there
for ever.
"""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("hone.fork")


def warn_of_threads() -> None:
    """Log the names of other Python threads, if there are any."""
    others = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    if others:
        logger.warning(
            "the engine is forked while other threads run (%s); it may hang: start it before them",
            ", ".join(others),
        )
