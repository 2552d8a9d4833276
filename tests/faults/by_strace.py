"""The same kills by strace, where it is installed: a second opinion on `tests.faults.tracer`.

`python -m tests.faults.by_strace NAME FOLDER` is the process that is killed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.faults.campaign import Figures, empty, examined, in_copy, scenario, template
from tests.faults.conftest import ENVIRONMENT, ROOT

CALLS = ("mkdir", "pwrite64", "fsync", "fdatasync", "rename", "unlink", "ftruncate")
"""None of which an interpreter makes by itself, if it writes no bytecode."""


def kill(name: str, most: int) -> Figures:
    """Kill it as it makes its n-th call of each kind, for n up to `most`."""
    acting = scenario(name)
    figures = empty(acting)
    figures.scenario += ", by strace"
    with template(acting) as start:
        for call in CALLS:
            for n in range(1, most + 1):
                with in_copy(start) as folder:
                    status, said = _kill_at(call, n, name, folder)
                    if status == 0:
                        break  # it makes no more of them
                    figures.at[call] += 1
                    broken = examined(acting, folder, said)
                    broken["unusable"] += status not in (-9, 137)
                    figures.add(said, broken, f"killed at {call} {n}, status {status}")
    return figures


def _kill_at(call: str, n: int, name: str, folder: Path) -> tuple[int, list[str]]:
    done = subprocess.run(
        [
            "strace", "-f", "-o", "/dev/null", "-e", f"trace={call}",
            "-e", f"inject={call}:signal=SIGKILL:when={n}",
            sys.executable, "-m", "tests.faults.by_strace", name, str(folder),
        ],
        env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}, cwd=ROOT, stdout=subprocess.PIPE,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines(keepends=True)
    return done.returncode, [line.rstrip("\n") for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    scenario(sys.argv[1]).act(Path(sys.argv[2]), lambda line: print(line, flush=True))
