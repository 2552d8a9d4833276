"""Run a command that cannot outlive the process that started it: `python -m server.tether PID CMD`.

The kernel kills the command when its parent dies, even by SIGKILL. The wish is set here, in a
fresh interpreter that then becomes the command, because code between fork and exec in a process
with threads may deadlock. With `--group` before PID the interpreter stays, and takes with it what
the command has started too: `npx` and the like only start what they are named for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, sign: signal.Signals = signal.SIGKILL) -> None:
    """Ask for `sign` at the death of `parent`; exits at once if it is dead already. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, sign, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent:
        # It died before the wish was set, so the signal will never come.
        sys.exit(1)


def run_group(parent: int, command: Sequence[str]) -> None:
    """Run `command`, and end with everything in our process group once it or `parent` has ended.

    We must lead the group. SIGTERM to it is the command's to answer.
    """
    if os.getpgrp() != os.getpid():
        sys.exit("server.tether --group must lead a process group: start it in a new session")
    # Handlers, not SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGHUP, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGTERM, lambda *_: None)
    die_with_parent(parent, signal.SIGHUP)
    try:
        subprocess.run(command, check=False)  # noqa: S603 - the owner's own command
    except OSError as error:
        sys.exit(f"{command[0]!r} cannot be started: {error.strerror}")
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    if sys.argv[1] == "--group":
        run_group(int(sys.argv[2]), sys.argv[3:])
        return
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    os.execvp(command[0], command)  # noqa: S606 - the command is the supervisor's own argv


if __name__ == "__main__":
    main()
