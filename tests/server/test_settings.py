"""One settings tree: who wins, what is refused, and what the trainer is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.commands.client import Client
from server.settings import Settings, described, load_settings


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HONE_CONFIG", "HONE_HTTP__PORT", "HONE_MODEL__PATH", "HONE_TRAINER__BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_flags_beat_environment_beats_file_beats_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("hone.toml").write_text(
        '[http]\nport = 1\n[model]\npath = "file"\ndtype = "float32"\n[trainer]\nthreads = 2\n'
    )
    monkeypatch.setenv("HONE_HTTP__PORT", "2")
    monkeypatch.setenv("HONE_MODEL__PATH", "env")
    settings = load_settings({"http.port": 3, "model.path": None})
    assert (settings.http.port, settings.model.path) == (3, "env")
    assert (settings.model.dtype, settings.http.host) == ("float32", "127.0.0.1")


def test_a_named_file_must_exist_and_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.toml"):
        load_settings({"config": "other.toml"})
    Path("other.toml").write_text('agents = "elsewhere"\n')
    settings = load_settings({"config": "other.toml", "model.max_lora_rank": 8})
    shared = settings.shared_environment()
    assert shared["HONE_CONFIG"] == "other.toml"

    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    read_back = load_settings()
    assert (read_back.agents, read_back.model) == (Path("elsewhere"), settings.model)


def test_the_trainers_section_reaches_the_trainer_whoever_said_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("hone.toml").write_text("[trainer]\nthreads = 2\nseed = 1\n")
    monkeypatch.setenv("HONE_TRAINER__OWNER", "env")
    shared = load_settings({"trainer.seed": "7", "http.port": 9000}).shared_environment()
    told = {key: shared[f"HONE_TRAINER__{key}"] for key in ("SEED", "THREADS", "OWNER")}
    assert told == {"SEED": "7", "THREADS": "2", "OWNER": "env"}
    assert shared["HONE_TRAINER__BASE_URL"] == "http://127.0.0.1:9000"
    behind = load_settings({"trainer.base_url": "http://proxy"}).shared_environment()
    assert behind["HONE_TRAINER__BASE_URL"] == "http://proxy"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8321"),
        ("::1", "http://[::1]:8321"),
        ("0.0.0.0", "http://127.0.0.1:8321"),
        ("::", "http://[::1]:8321"),
        ("box.example", "http://box.example:8321"),
    ],
)
def test_one_address_for_everybody_on_this_machine(host: str, url: str) -> None:
    settings = load_settings({"http.host": host, "http.api_key": "k"})
    assert settings.http.url == url
    assert settings.shared_environment()["HONE_TRAINER__BASE_URL"] == url
    assert Client(settings, None).url == url


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http.host": "0.0.0.0"}, "api_key"),
        ({"http.host": "box.example"}, "api_key"),
        ({"http.api_key": ""}, "empty"),
        ({"http.prot": 1}, "prot"),
        ({"modle.path": "x"}, "modle"),
        ({"engine.max_loras": "many"}, "max_loras"),
        ({"trainer.sede": 7}, "sede"),
        ({"trainer.threads": 0}, "threads"),
        ({"storage.database": "var/hone.db"}, "expected sqlite:///PATH"),
        ({"storage.database": "postgresql://h:port/hone"}, "expected sqlite:///PATH"),
        ({"storage.database": "mysql://h/hone"}, "expected sqlite:///PATH"),
        ({"storage.database": "sqlite://"}, "memory forgets"),
        ({"storage.redis": "localhost:6379"}, "expected redis://HOST"),
        ({"storage.redis": "redis://h:port"}, "expected redis://HOST"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        load_settings(flags)


def test_others_are_let_in_with_a_key_and_loopback_without() -> None:
    assert load_settings({"http.host": "0.0.0.0", "http.api_key": "k"}).http.host == "0.0.0.0"
    for host in ("localhost", "127.0.0.2", "::1"):
        assert load_settings({"http.host": host}).http.api_key is None


def test_a_flags_help_is_its_settings_own() -> None:
    assert described("http.port") == type(Settings().http).model_fields["port"].description


def test_a_wrong_url_is_not_repeated_with_its_password() -> None:
    for key, url in (
        ("storage.database", "mysql://me:s3cret@h/hone"),
        ("storage.database", "postgresql://me:s3cret@h:x/hone"),
        ("storage.redis", "redis://:s3cret/y@h"),
    ):
        with pytest.raises(ValidationError) as caught:
            load_settings({key: url})
        assert "s3cret" not in caught.value.errors()[0]["msg"]


def test_a_gpu_is_not_given_away_twice() -> None:
    on_gpu = {"trainer.device": "cuda"}
    with pytest.raises(
        ValidationError, match=r"0\.9 and trainer\.gpu_memory_share 0\.4 of the same"
    ):
        load_settings(on_gpu)
    load_settings({**on_gpu, "engine.gpu_memory_utilization": 0.6})
    load_settings({"trainer.device": "cuda:1"})
    load_settings({**on_gpu, "trainer.enabled": False})


def test_pauses_are_for_one_process_beside_our_own_engine() -> None:
    pausing = {"trainer.share": "pause"}
    load_settings({**pausing, "trainer.pause_seconds": 10, "trainer.serve_seconds": 0.1})
    for wrong, match in (
        ({"engine.kind": "remote", "engine.url": "http://gpu:8000"}, "not ours to hold up"),
        ({"trainer.processes": 2}, "pauses are for one process"),
        ({"trainer.pause_seconds": 10.5}, "less than or equal to 10"),
        ({"trainer.pause_seconds": 0}, r"greater than or equal to 0\.1"),
        ({"trainer.serve_seconds": 0}, r"greater than or equal to 0\.1"),
        ({"trainer.share": "sometimes"}, "'beside' or 'pause'"),
    ):
        with pytest.raises(ValidationError, match=match):
            load_settings({**pausing, **wrong})
