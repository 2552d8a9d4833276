"""Run a command that cannot outlive the process that started it: `python -m server.tether CMD ...`.

The kernel kills the command when its parent dies, even by SIGKILL. The wish is set here, in a
fresh interpreter that then becomes the command, because code between fork and exec in a process
with threads may deadlock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL at the death of `parent`; exits at once if it is dead already. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent:
        # It died before the wish was set, so the signal will never come.
        sys.exit(1)


def main() -> None:
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    os.execvp(command[0], command)  # noqa: S606 - the command is the supervisor's own argv


if __name__ == "__main__":
    main()
