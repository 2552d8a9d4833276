"""Other people's clients and their own test suites on a live server: `make compat`.

Each peer has an environment of its own under `.compat/`, made from a package index, so that its
pins cannot clash with ours. Not part of `make test`, which fetches nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from examples.desk.stack import Stack

PEERS = Path(__file__).parent / "peers"
HOME = Path(__file__).parents[2] / ".compat"
PYTHON_PEERS = {
    "openai_agents": ["openai-agents==0.24.0"],
    "litellm_calls": ["litellm==1.110.2"],
    "langchain_suite": [
        *("langchain-openai==1.7.4", "langchain-tests==1.1.9"),
        *("pytest==9.2.0", "pytest-asyncio==1.5.0"),
    ],
    "schemathesis": ["schemathesis==4.32.5"],
    "trackio": ["trackio==0.43.0", "pydantic>=2.9"],
    "wandb": ["wandb==0.31.0", "pydantic>=2.9"],
}
NODE_PEER = "openai@7.57.0"
KEY = "of-the-settings"
SUITE = [
    *("-m", "pytest", "-q", "--noconftest", "--import-mode=importlib", "-c", os.devnull),
    *("-p", "no:cacheprovider", "-o", "asyncio_mode=auto"),
    *("-o", "asyncio_default_test_loop_scope=session"),
    *("-o", "asyncio_default_fixture_loop_scope=session"),
]


@pytest.fixture(scope="module")
def hone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The desk, whose agent and policy the peers use, on the real engine."""
    with Stack(tmp_path_factory.mktemp("clients")) as stack:
        stack.wait_hone()
        yield stack.hone_url


def environment_of(peer: str) -> Path:
    """The folder of a peer's programs; made if it is not there or asks for other versions."""
    folder, wanted = HOME / peer, "\n".join(PYTHON_PEERS[peer])
    made_for = folder / "made-for.txt"
    if not made_for.is_file() or made_for.read_text() != wanted:
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "--clear", folder], check=True)
        python = ["--python", str(folder / "bin" / "python")]
        subprocess.run([*uv, "pip", "install", "-q", *python, *PYTHON_PEERS[peer]], check=True)
        made_for.write_text(wanted)
    return folder / "bin"


def run(command: Sequence[str | Path], hone_url: str, seconds: int = 240, **more: str) -> str:
    """What a peer prints; a failure shows it. `more` are variables for it."""
    variables = {**os.environ, "HONE_URL": hone_url, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more}
    done = subprocess.run(
        command, env=variables, cwd=HOME, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    told = done.stdout + done.stderr
    print(told)
    assert done.returncode == 0, told[-4000:]
    return told


@pytest.mark.parametrize("peer", ["openai_agents", "litellm_calls"])
def test_a_python_peer_is_served(peer: str, hone_url: str) -> None:
    assert ": ok" in run([environment_of(peer) / "python", PEERS / f"{peer}.py"], hone_url)


def test_the_node_client_is_served(hone_url: str) -> None:
    npm = shutil.which("npm")
    assert npm is not None, "the Node client needs node and npm"
    folder = HOME / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "package.json").is_file():
        (folder / "package.json").write_text("{}")
    subprocess.run([npm, "install", "-s", NODE_PEER], cwd=folder, check=True)
    script = Path(shutil.copy(PEERS / "openai_node.mjs", folder))  # packages are looked up there
    assert ": ok" in run(["node", script], hone_url)


def test_langchains_own_suite_passes(hone_url: str) -> None:
    python = environment_of("langchain_suite") / "python"
    assert " passed" in run([python, *SUITE, PEERS / "langchain_suite.py"], hone_url)


@pytest.fixture(scope="module")
def locked_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, where everybody must show a key."""
    settings = {"HONE_HTTP__API_KEY": KEY}
    with Stack(tmp_path_factory.mktemp("locked"), settings=settings) as stack:
        stack.wait_hone()
        yield stack.hone_url


def made(url: str) -> dict[str, str]:
    """Things with ids, so that routes that take one have something to answer of."""

    def id_of(path: str, **body: object) -> str:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    return {
        "RUN_ID": id_of("/v1/agents/desk/runs", input="Please cancel the lamp of Bavorik."),
        "RESPONSE_ID": id_of("/v1/responses", model="desk", input="hello", max_output_tokens=8),
        "KEY_ID": id_of("/v1/keys", name="to be revoked", scopes=["runs"]),
    }


@pytest.mark.timeout(600)  # thousands of requests, and the first time an environment to be made
def test_the_openapi_document_says_what_the_server_does(locked_url: str) -> None:
    program: list[str | Path] = [environment_of("schemathesis") / "schemathesis"]
    program += ["--config-file", PEERS / "schemathesis.toml"]
    options = ["--checks", "all", "--max-examples", "50", "--continue-on-failure", "--no-color"]
    options += ["-H", f"Authorization: Bearer {KEY}"]
    command = [*program, "run", f"{locked_url}/openapi.json", *options]
    run(command, locked_url, seconds=900, **made(locked_url))
