"""Run a command that cannot outlive the process that started it: `python -m server.tether PID CMD`.

The kernel kills the command when its parent dies, even by SIGKILL. The wish is set here, in a
fresh interpreter that then becomes the command, because code between fork and exec in a process
with threads may deadlock. With `--group` before PID the interpreter stays, and takes with it what
the command has started too: `npx` and the like only start what they are named for. It also passes
on what the command writes to stdout, and ends all of it at a line that has no end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
LONGEST_LINE = 16 * 2**20
"""Bytes; who reads the lines keeps each whole."""


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
        started = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 - the owner's own
    except OSError as error:
        sys.exit(f"{command[0]!r} cannot be started: {error.strerror}")
    assert started.stdout is not None  # noqa: S101 - narrows
    lines = threading.Thread(target=_pass_on, args=(started.stdout.fileno(),), daemon=True)
    lines.start()
    started.wait()
    lines.join(1.0)  # its last words; others of the group may hold the pipe open for ever
    os.killpg(0, signal.SIGKILL)


def _pass_on(source: int) -> None:
    """From descriptor `source` to our stdout; ends the group at too long a line."""
    length = 0
    while piece := os.read(source, 2**16):
        begun = piece.rfind(b"\n") + 1
        length = len(piece) - begun + (0 if begun else length)
        if length > LONGEST_LINE:
            print(f"a line of more than {LONGEST_LINE} bytes was cut off", file=sys.stderr)
            os.killpg(0, signal.SIGKILL)
        while piece:
            piece = piece[os.write(1, piece) :]


def main() -> None:
    if sys.argv[1] == "--group":
        run_group(int(sys.argv[2]), sys.argv[3:])
        return
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    os.execvp(command[0], command)  # noqa: S606 - the command is the supervisor's own argv


if __name__ == "__main__":
    main()
