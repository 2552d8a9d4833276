"""`python -m tests.faults.house FOLDER`: a server that says its URL and ends with its input."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.server.house import running, scripted_parts, settings_in, write_agent

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_agent(folder)
    with running(settings_in(folder), scripted_parts(folder)) as house:
        print(house.url, flush=True)
        sys.stdin.read()
