"""Agents' files: defaults, strictness, and messages that name the file and the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.spec import LearningSpec
from server.agents.spec import AgentFileError, AgentSpec, load_agent, load_agents
from server.tools.sources import OpenApiSource, PythonSource, interpolate

DESK = """
name: desk
system: You work at an order desk.
tools:
  - openapi: desk.json
    base_url: http://127.0.0.1:9
    operations: [find_orders, refund]
    headers: {Authorization: "Bearer ${env:DESK_TOKEN}"}
    timeout_seconds: 2.5
  - python: examples.tools:today
limits: {turns: 6}
sampling: {max_tokens: 64}
reward:
  metrics: {success: {weight: 2}}
training: {min_episodes: 16, learning_rate: 1.0e-3}
"""


def write(folder: Path, text: str, name: str = "desk.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    write(tmp_path, DESK)
    write(tmp_path, "not: [an, agent", "notes.txt")
    agents = load_agents(tmp_path)
    assert list(agents) == ["desk"]
    desk = agents["desk"]
    openapi, python = desk.tools
    assert isinstance(openapi, OpenApiSource)
    assert openapi.openapi == str(tmp_path / "desk.json")
    assert openapi.operations == ("find_orders", "refund")
    assert isinstance(python, PythonSource)
    assert (desk.limits.turns, desk.limits.tokens, desk.limits.seconds) == (6, 2048, 60)
    assert (desk.sampling.temperature, desk.sampling.max_tokens) == (1.0, 64)


def test_files_of_secrets_are_beside_the_agents_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    source = """name: desk
tools:
  - openapi: desk.json
    headers: {Authorization: "Bearer ${file:token}"}
    bind: {pay: {keys: ["${file:token}", "${env:DESK_KEY}"]}}
    constrain: {pay: {properties: {note: {pattern: "${file:token}"}}}}
"""
    [tool] = load_agent(write(tmp_path, source)).tools
    assert isinstance(tool, OpenApiSource)
    assert interpolate(tool.headers["Authorization"].get_secret_value()) == "Bearer s3cret"
    assert tool.bind == {"pay": {"keys": [f"${{file:{tmp_path}/token}}", "${env:DESK_KEY}"]}}
    assert tool.constrain["pay"]["properties"]["note"]["pattern"] == "${file:token}"


def test_the_trainer_reads_the_same_learning_from_the_file(tmp_path: Path) -> None:
    learning = load_agent(write(tmp_path, DESK)).learning
    assert learning == LearningSpec.model_validate(
        {
            "policy": "desk",
            "reward": {"metrics": {"success": {"weight": 2}}},
            "training": {"min_episodes": 16, "learning_rate": 1e-3},
        }
    )


def test_the_policy_may_have_a_name_of_its_own() -> None:
    assert AgentSpec(name="desk").policy == "desk"
    assert AgentSpec(name="desk", policy="shared").policy == "shared"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: desk\nlimits: {turn: 3}", "limits.turn: unknown key"),
        ("system: hi", "name: is missing"),
        ("name: Desk One", "name: String should match pattern"),
        ("name: desk\nlimits: {turns: 0}", "limits.turns: Input should be greater than"),
        ("name: desk\ntools: [{a2a: x}]", "keys 'openapi', 'mcp', 'python', 'code' or 'client'"),
        ("name: desk\ntools: [{mcp: npx}]", "tools.0.mcp: Value error, mcp is 'npx'; expected a"),
        ("name: desk\ntools: [{mcp: []}]", "mcp is an empty list"),
        ("name: desk\ntools: [{mcp: [x], headers: {a: b}}]", "headers and allow_hosts are a URL"),
        ("name: desk\ntools: [{mcp: http://x, env: {a: b}}]", "env and cwd are a command's"),
        ("name: desk\ntools: [{python: nope}]", "tools.0.python.python: String should match"),
        ("name: desk\ntools: [{openapi: a, timeout: 3}]", "tools.0.openapi.timeout: unknown key"),
        ("name: desk\ntenant: Shop", "tenant: String should match"),
        ("name: desk\ntenants: [shop]", "tenants: unknown key"),
        ("name: desk\nreward: {metric: {}}", "reward.metric: unknown key"),
        ("name: desk\nlimits: {spend: 1}", "limits.spend has no meaning without `price`"),
        (
            "name: desk\nwebhook: {url: http://x, secret: '${env:UNSET_HERE}'}",
            "'UNSET_HERE' is not",
        ),
        (
            "name: desk\nwebhook: {url: http://x, secret: s3cret}",
            "begins with neither 'whsec_' nor",
        ),
        ("name: desk\nwebhook: {url: ftp://x, secret: x}", "webhook.url: String should match"),
        ("name: desk\ntools: [{python: 'a:b', approval: {b: yes}}]", "approval.b: Input should be"),
        ("name: [", "cannot be read as YAML"),
        ("- name", "is a list; expected keys"),
        ("", "is a NoneType; expected keys"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(AgentFileError) as caught:
        load_agents(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_secrets_are_neither_printed_nor_quoted_in_errors(tmp_path: Path) -> None:
    good = write(tmp_path, "name: a\ntools: [{openapi: http://x, headers: {Key: s3cret}}]")
    assert "s3cret" not in repr(load_agent(good))
    bad = write(tmp_path, "name: a\ntools: [{openapi: http://x, headers: {Key: [s3cret]}}]")
    with pytest.raises(AgentFileError) as caught:
        load_agent(bad)
    assert "tools.0.openapi.headers.Key" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    for keys in ("env: {A: [s3cret]}", "cwd: x, headers: {A: s3cret}"):
        with pytest.raises(AgentFileError) as caught:
            load_agent(write(tmp_path, f"name: a\ntools: [{{mcp: [serve], {keys}}}]"))
        assert "tools.0.mcp" in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_two_files_must_not_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path, "name: one", "1.yaml")
    write(tmp_path, "name: two\npolicy: one", "2.yml")
    assert list(load_agents(tmp_path)) == ["one", "two"]
    write(tmp_path, "name: two\npolicy: one\ntraining: {epochs: 2}", "2.yml")
    with pytest.raises(AgentFileError, match=r"2\.yml: policy: 'one' is also the policy of .*1\."):
        load_agents(tmp_path)
    write(tmp_path, "name: two\npolicy: one\ntenant: acme", "2.yml")
    with pytest.raises(AgentFileError, match=r"2\.yml: tenant: policy 'one' .* 'default'"):
        load_agents(tmp_path)
    write(tmp_path, "name: one", "2.yml")
    with pytest.raises(AgentFileError, match=r"2\.yml: name: 'one' is already the name in .*1\."):
        load_agents(tmp_path)
    with pytest.raises(AgentFileError, match="is not a folder"):
        load_agents(tmp_path / "none")
