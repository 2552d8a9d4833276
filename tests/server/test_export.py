"""Exports: what was recorded is what files say, in both formats; no half file has its name."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from feedback.store import Store
from feedback.types import Episode, FeedbackEvent, ToolCall, Turn
from server import cli
from server.commands.client import CommandError
from server.export import files, rows
from tests.feedback.record_samples import corrected, episode, event, preferred
from tests.server.house import AGENT, House, write_agent

CALL = ToolCall("c1", "look_up", {"a": [1, {"b": math.nan}]}, "ok", "été\u2028\n", 0.5, 2)
TURNS = (
    Turn(0, (1, 2**32 - 1), (4, 5), (-0.1, -2.5), "said", "stop", (CALL,), None, 51.0, 0.25),
    Turn(1, (1, 2**32 - 1, 4, 5, 6), (7,), None, "", "length", (), "malformed", 52.0, 0.5),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> Path:
    """A folder to run commands in: an agent, and a record of either kind."""
    write_agent(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HONE_STORAGE__DATABASE", url)
    store = Store.open(url)
    store.begin(
        Episode(
            "e", "desk", 3, "refund/1", 50.0, agent="desk", temperature=0.7, turns=TURNS,
            stop_reason="finished", ended_at=60.0, metadata={"who": "ann"},
        )
    )  # fmt: skip
    store.begin(episode("open", ended_at=None, turns=(), tenant="acme", policy="other"))
    store.add_feedback(
        [event("1", value=0.25), corrected("2", "Sir,"), preferred("3", "e", "open"),
         FeedbackEvent("4", "ann", None, "success", None, 70.0, 71.0, task_key="refund/1",
                       comment="no", key_id="k")]
    )  # fmt: skip
    store.close()
    return tmp_path


def hone(*arguments: str) -> bytes:
    done = CliRunner().invoke(cli.app, ["export", *arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout_bytes


def lines(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.decode("ascii").splitlines()]


def table(path: Path) -> list[dict[str, Any]]:
    """A Parquet file's rows; pyarrow gives maps as pairs."""
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [
        row | ({"metadata": dict(row["metadata"])} if "metadata" in row else {}) for row in found
    ]


def test_both_formats_say_what_was_recorded(place: Path) -> None:
    hone("--output", "e.parquet", "--feedback", "f.parquet")
    hone("--output", "e.jsonl", "--feedback", "f.jsonl")
    told, said = lines((place / "e.jsonl").read_bytes()), lines((place / "f.jsonl").read_bytes())
    assert lines(hone()) == told
    assert sorted(path.name for path in place.glob("[.ef]*.*")) == [
        "e.jsonl", "e.parquet", "f.jsonl", "f.parquet",
    ]  # fmt: skip

    assert [row["id"] for row in told] == ["open", "e"], "by tenant first"
    assert told[0] | {"tenant": "acme", "turns": [], "reward": None, "agent": None} == told[0]
    first, second = told[1]["turns"]
    assert told[1]["metadata"] == {"who": "ann"}
    assert (told[1]["version"], told[1]["temperature"], told[1]["reward"]) == (3, 0.7, 0.25)
    assert first["prompt_token_ids"] == [1, 2**32 - 1]
    assert second["prompt_token_ids"] == [1, 2**32 - 1, 4, 5, 6]
    assert first["logprobs"] == pytest.approx([-0.1, -2.5], rel=1e-7)
    assert (second["logprobs"], second["fault"]) == (None, "malformed")
    [call] = first["tool_calls"]
    assert json.loads(call["arguments"]) == {"a": [1, {"b": None}]}
    assert (call["result"], call["attempts"]) == ("été\u2028\n", 2)
    assert [(row["event_id"], row["episode_id"], row["kind"]) for row in said] == [
        ("1", "e", "value"), ("2", "e", "correction"), ("3", "e", "preference"),
        ("4", "e", "value"),
    ]  # fmt: skip
    assert (said[2]["worse_id"], said[3]["task_key"], said[3]["value"]) == (
        "open",
        "refund/1",
        None,
    )

    assert table(place / "e.parquet") == told
    assert table(place / "f.parquet") == said
    schema = pq.read_schema(place / "e.parquet")
    assert schema.metadata[b"hone.export"] == b"1"
    assert str(schema.field("turns").type.value_type.field("logprobs").type).endswith("float>")


def test_what_is_left_out_is_null_under_the_same_names(place: Path) -> None:
    whole = lines(hone())
    bare = lines(hone("--no-texts", "--no-tokens", "--policy", "desk", "--since", "1970-01-01"))
    assert [row["id"] for row in bare] == ["e"]
    turn, full = bare[0]["turns"][0], whole[1]["turns"][0]
    gone = {"prompt_token_ids", "token_ids", "logprobs", "text", "fault"}
    assert turn == full | dict.fromkeys(gone) | {"tool_calls": turn["tool_calls"]}
    assert turn["tool_calls"][0] == full["tool_calls"][0] | {"arguments": None, "result": None}
    assert hone("--until", "1970-01-01") == b""
    assert b"Sir" not in hone("--no-texts", "--feedback", "f.jsonl") + Path("f.jsonl").read_bytes()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_an_export_that_fails_leaves_the_file_of_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "e.parquet").write_text("before")

    def full_disk(found: object, contents: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.commands.record.episode_row", full_disk)
    with pytest.raises(CommandError, match="No space left"):
        hone("--output", "e.parquet", "--feedback", "f.parquet")
    assert (place / "e.parquet").read_text() == "before"
    assert [path.name for path in place.iterdir() if "parquet" in path.name] == ["e.parquet"]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_mistakes_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "server.export.parquet", raising=False)
    monkeypatch.delattr("server.export.parquet", raising=False)
    for arguments, message in (
        (["--output", "e.parquet"], r"pip install 'hone\[parquet\]'"),
        (["--format", "parquet"], "name a file with --output"),
        (["--output", "none/e.jsonl"], "No such file"),
        (["--until", "yesterday"], "expected a time such as"),
    ):
        with pytest.raises(CommandError, match=message):
            hone(*arguments)
    assert not list(place.glob("*e.*"))
    (place / "agents" / "desk.yaml").write_text(AGENT + "nonsense: 1\n")
    with pytest.raises(CommandError, match="nonsense"):
        hone()
    monkeypatch.setenv("HONE_STORAGE__DATABASE", "sqlite:///none/hone.db")
    monkeypatch.setenv("HONE_AGENTS", str(place))
    with pytest.raises(CommandError, match="there is no record at 'none"):
        hone()


def test_row_groups_are_written_as_they_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.export import parquet

    monkeypatch.setattr(parquet, "_ROWS", 2)
    row = dict.fromkeys(parquet.FEEDBACK.names, "x") | dict.fromkeys(
        ("value", "turn", "event_time", "received_at"), 1
    )
    with files.whole_file(tmp_path / "f.parquet") as file:
        with files.writing_rows(file, "parquet", "feedback") as add:
            for some in (1, 2, 0, 1):
                add([row] * some)
        assert not (tmp_path / "f.parquet").exists()
    found = pq.ParquetFile(tmp_path / "f.parquet")
    assert [found.metadata.row_group(i).num_rows for i in range(2)] == [3, 1]


def test_a_tenants_admin_reads_it_over_http(house: House) -> None:
    for name in ("one", "two"):
        run = {"input": "hello", "episode_id": name}
        assert house.http.post("/v1/agents/desk/runs", json=run).status_code == 200
        house.http.post("/v1/feedback", json={"episode_id": name, "value": 1})
    answer = house.http.get("/v1/export/episodes")
    assert answer.headers["content-type"] == "application/jsonl"
    told = lines(answer.content)
    assert [(row["id"], row["reward"]) for row in told] == [("one", 1.0), ("two", 1.0)]
    assert told[0]["turns"][0]["text"].startswith("desk@v0 heard")
    later = {"since": told[1]["started_at"], "texts": "false", "tokens": "false"}
    bare = lines(house.http.get("/v1/export/episodes", params=later).content)
    assert [(row["id"], row["turns"][0]["token_ids"]) for row in bare] == [("two", None)]
    said = lines(house.http.get("/v1/export/feedback").content)
    assert [row["episode_id"] for row in said] == ["one", "two"]
    assert house.http.get("/v1/export/episodes", params={"until": 1}).content == b""
    refused = house.http.get("/v1/export/episodes", params={"format": "parquet"})
    assert refused.status_code == 400, "what is not known is not ignored"


def test_rows_have_the_columns_of_the_schema() -> None:
    from feedback.export import ExportedEpisode
    from feedback.reward import Reward
    from server.export import parquet

    found = ExportedEpisode(episode("e"), [event("1")], Reward(None, "waits"), None)
    row = rows.episode_row(found, rows.Contents())
    assert list(row) == parquet.EPISODES.names
    assert list(row["turns"][0]) == [
        field.name for field in parquet.EPISODES.field("turns").type.value_type
    ]
    [said] = rows.feedback_rows(found, rows.Contents())
    assert list(said) == parquet.FEEDBACK.names
