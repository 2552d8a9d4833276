"""The command line `hone`: names, flags and help. What each command does is in `server.commands`.

Flags are derived from the settings tree; anything without a flag is set by `--set section.key=...`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from server.access.caller import SCOPES, USUAL_SCOPES
from server.commands import views
from server.commands.client import Client, CommandError
from server.settings import Settings, described, load_settings

app = typer.Typer(
    name="hone",
    help="Serve agents that learn from outcomes: vLLM, hot-swappable LoRA, a trainer beside it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

keys = typer.Typer(name="keys", help="API keys: who may do what.", no_args_is_help=True)
app.add_typer(keys)

ConfigFlag = Annotated[Path | None, typer.Option("--config", help=described("config"))]
UrlFlag = Annotated[
    str | None, typer.Option("--url", envvar="HONE_URL", help="The server; default: as configured.")
]


def main() -> None:
    """Entry point: what an operator can mend is one line and status 1, not a traceback."""
    try:
        app()
    except CommandError as error:
        _fail(str(error))


@app.command()
def serve(
    *,
    config: ConfigFlag = None,
    model: Annotated[str | None, typer.Option(help=described("model.path"))] = None,
    agents: Annotated[Path | None, typer.Option(help=described("agents"))] = None,
    webhooks: Annotated[Path | None, typer.Option(help=described("webhooks"))] = None,
    host: Annotated[str | None, typer.Option(help=described("http.host"))] = None,
    port: Annotated[int | None, typer.Option(help=described("http.port"))] = None,
    trainer: Annotated[
        bool | None, typer.Option("--trainer/--no-trainer", help=described("trainer.enabled"))
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting.")
    ] = None,
) -> None:
    """Serve the base model, its policies and its agents, and train in the background."""
    flags: dict[str, Any] = {
        "config": config,
        "model.path": model,
        "agents": agents,
        "webhooks": webhooks,
        "http.host": host,
        "http.port": port,
        "trainer.enabled": trainer,
        **_assignments(set_ or []),
    }
    settings = _settings(flags)
    # OpenBLAS reads it as numpy is imported, and the engine's fork must find no threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Imported here: the other commands should not wait for the serving stack.
    from server.commands import serve as serving  # noqa: PLC0415

    try:
        serving.serve(settings)
    except serving.START_ERRORS as error:
        raise CommandError(str(error)) from error
    # Everything is stopped; tearing down an interpreter that holds torch takes seconds more.
    logging.shutdown()
    os._exit(0)


@app.command()
def status(config: ConfigFlag = None, url: UrlFlag = None) -> None:
    """What is live, and whether it is learning; if not, why not yet."""
    client = _client(config, url)
    training = client.get("/v1/training")
    trained = {policy["policy"] for policy in training["policies"]}
    policies = [p for p in client.get("/v1/policies")["data"] if p["id"] not in trained]
    _print(views.status_view(training, policies, client.get("/v1/models")["data"]))


@app.command()
def releases(policy: str, config: ConfigFlag = None, url: UrlFlag = None) -> None:
    """The versions of POLICY, where they came from, and what happened to them."""
    _print(views.releases_view(_client(config, url).get(f"/v1/policies/{policy}")))


@app.command()
def rollback(
    policy: str,
    reason: Annotated[str, typer.Option(help="Kept in the record.")] = "asked at the terminal",
    to: Annotated[int | None, typer.Option(help="Version; default: the one before.")] = None,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Take the canary of POLICY back, or else its live version; new episodes follow at once."""
    body = {"reason": reason, **({} if to is None else {"to": to})}
    done = _client(config, url).post(f"/v1/policies/{policy}/rollback", body)
    _print(f"[bold]{done['from']}[/] is rolled back; [bold green]{done['live']}[/] is live")


@app.command()
def promote(
    policy: str,
    reason: Annotated[str, typer.Option(help="Kept in the record.")] = "asked at the terminal",
    version: Annotated[
        int | None, typer.Option(help="Default: the canary, else the newest proven candidate.")
    ] = None,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Make a version of POLICY live by hand, past its trial; new episodes take it at once."""
    body = {"reason": reason, **({} if version is None else {"version": version})}
    done = _client(config, url).post(f"/v1/policies/{policy}/promote", body)
    _print(f"[bold green]{done['live']}[/] is live; it was [bold]{done['from']}[/]")


@app.command()
def pin(
    policy: str,
    version: int,
    *,
    off: Annotated[bool, typer.Option("--off", help="Keep it no longer.")] = False,
    reason: Annotated[str, typer.Option(help="Kept in the record.")] = "asked at the terminal",
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Keep a version of POLICY on disk, and live if it is live now, until the pin is off."""
    body = {"version": version, "reason": reason, "pinned": not off}
    done = _client(config, url).post(f"/v1/policies/{policy}/pin", body)
    _print(f"[bold]{done['id']}[/] is {'pinned' if done['pinned'] else 'pinned no longer'}")


@app.command()
def episodes(
    policy: Annotated[str | None, typer.Option(help="Only this policy's.")] = None,
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """The latest episodes."""
    found = _client(config, url).get("/v1/episodes", policy=policy, agent=agent, limit=limit)
    _print(views.episodes_view(found["data"]))


@app.command()
def episode(episode_id: str, config: ConfigFlag = None, url: UrlFlag = None) -> None:
    """One episode: its turns, its tools' answers, its feedback and reward."""
    _print(views.episode_view(_client(config, url).get(f"/v1/episodes/{episode_id}")))


@app.command()
def feedback(
    target: str,
    value: Annotated[float | None, typer.Argument(help="A number; 1 and 0 for yes and no.")] = None,
    *,
    metric: Annotated[str | None, typer.Option(help="Which outcome; default: success.")] = None,
    task: Annotated[bool, typer.Option("--task", help="TARGET is a task's key.")] = False,
    turn: Annotated[int | None, typer.Option(help="Only this turn, from 0.")] = None,
    correction: Annotated[str | None, typer.Option(help="What should have been said.")] = None,
    better_than: Annotated[str | None, typer.Option(help="The episode that was worse.")] = None,
    retract: Annotated[bool, typer.Option("--retract", help="Take back what was said.")] = False,
    comment: Annotated[str | None, typer.Option(help="Kept in the record.")] = None,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Say how good an episode was, for example `hone feedback ep_... 1`."""
    key = "better" if better_than is not None else "task_key" if task else "episode_id"
    given = {
        key: target, "worse": better_than, "value": value, "metric": metric, "turn": turn,
        "correction": correction, "comment": comment, "source": "cli",
    }  # fmt: skip
    said = {name: what for name, what in given.items() if what is not None}
    receipt = _client(config, url).post("/v1/feedback", said | ({"value": None} if retract else {}))
    parked = "; no such episode yet, it is kept for when there is one" if receipt["parked"] else ""
    _print(f"{receipt['status']} as {receipt['event_id']}{parked}")


@keys.command("create")
def create_key(
    name: str,
    *,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(SCOPES)}; once for each. Default: {', '.join(USUAL_SCOPES)}."
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Default: your key's own.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires.")] = None,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Make a key called NAME. Its text is shown this once."""
    body: dict[str, Any] = {"name": name, "scopes": scope or list(USUAL_SCOPES)}
    if tenant is not None:
        body["tenant"] = tenant
    if days is not None:
        body["expires_at"] = time.time() + days * 86_400
    made = _client(config, url).post("/v1/keys", body)
    about = f"{made['id']} of tenant {made['tenant']}: {', '.join(made['scopes'])}"
    Console(stderr=True).print(
        f"[bold]{escape(about)}[/]; keep it, it is not shown again:", soft_wrap=True
    )
    print(made["key"])  # alone on stdout, for a pipe


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """The keys, newest first; their secrets are nowhere."""
    _print(views.keys_view(_client(config, url).get("/v1/keys", tenant=tenant)["data"]))


@keys.command("revoke")
def revoke_key(key_id: str, config: ConfigFlag = None, url: UrlFlag = None) -> None:
    """End a key for good."""
    done = _client(config, url).post(f"/v1/keys/{key_id}/revoke", {})
    _print(f"[bold]{done['id']}[/] of tenant {done['tenant']} is revoked")


@app.command()
def practice(
    model: Annotated[str, typer.Argument(help="'agent:NAME', or a policy's name.")],
    *,
    environment: Annotated[
        str | None,
        typer.Option(help="'package.module:name'; default: the agent's file's practice."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Of one round.")] = 16,
    attempts: Annotated[int, typer.Option(min=1, help="At each task: K.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Each draws other tasks.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="Attempts side by side.")] = 16,
    max_turns: Annotated[int, typer.Option(min=1, help="Requests of one attempt.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the tasks.")] = 0,
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Have MODEL attempt an environment's tasks, K times each: it learns of them as of traffic."""
    from server.commands import practice as practising  # noqa: PLC0415 - for this command only

    settings = _settings({"config": config})
    plan = practising.Plan(model, attempts=attempts, at_once=at_once, max_turns=max_turns)
    declared = practising.declared_environment(settings.agents, model, environment)
    practising.practise(
        Client(settings, url), declared, plan, tasks=tasks, rounds=rounds, seed=seed, report=_print
    )


@app.command()
def quarantine(
    *,
    release: Annotated[int | None, typer.Option(help="Let this one count again.")] = None,
    discard: Annotated[int | None, typer.Option(help="Never let this one count.")] = None,
    reason: Annotated[str, typer.Option(help="Kept in the record.")] = "asked at the terminal",
    config: ConfigFlag = None,
    url: UrlFlag = None,
) -> None:
    """Sources whose word does not count; release or discard one by its number."""
    client = _client(config, url)
    for number, verb in ((release, "release"), (discard, "discard")):
        if number is not None:
            client.post(f"/v1/feedback/quarantine/{number}/{verb}", {"reason": reason})
    _print(views.quarantine_view(client.get("/v1/feedback/quarantine")["data"]))


@app.command()
def export(
    *,
    output: Annotated[
        Path | None, typer.Option(help="File of the episodes; default: standard output.")
    ] = None,
    feedback: Annotated[Path | None, typer.Option(help="File of what was said of them.")] = None,
    format: Annotated[
        Literal["jsonl", "parquet"] | None,
        typer.Option(help="Default: as --output ends, else jsonl."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's; default: all.")] = None,
    policy: Annotated[str | None, typer.Option(help="Only this policy's.")] = None,
    agent: Annotated[str | None, typer.Option(help="Only this agent's.")] = None,
    purpose: Annotated[
        Literal["live", "practice", "evaluation", "shadow"] | None, typer.Option()
    ] = None,
    since: Annotated[str | None, typer.Option(help="That began then or later (ISO, UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="That began before; default: now.")] = None,
    texts: Annotated[bool, typer.Option(help="With what models, tools and people said.")] = True,
    tokens: Annotated[bool, typer.Option(help="With token ids and logprobs.")] = True,
    config: ConfigFlag = None,
) -> None:
    """Write the record to files, JSONL or Parquet: docs/export.md says what is in them."""
    from feedback.export import ExportQuery  # noqa: PLC0415 - for this command only
    from server.commands import record  # noqa: PLC0415
    from server.export.rows import Contents  # noqa: PLC0415

    now = time.time()
    last = record.moment("--until", until)
    query = ExportQuery(
        until=now if last is None else min(now, last),
        since=record.moment("--since", since),
        tenant=tenant, policy=policy, agent=agent, purpose=purpose,
    )  # fmt: skip
    targets = record.Targets(record.target_format(format, output), output, feedback)
    contents = Contents(texts=texts, tokens=tokens)
    done = record.export(_settings({"config": config}), query, targets, contents)
    said = "" if feedback is None else f" and {done.events:,} statements on them"
    Console(stderr=True).print(f"{done.episodes:,} episodes{said} in {done.seconds:.1f} s")


@app.command()
def prune(
    *,
    days: Annotated[
        float | None,
        typer.Option(min=1, help="Of episodes; default: as configured, storage.keep_days."),
    ] = None,
    parked_days: Annotated[
        float | None, typer.Option(min=1, help="Of feedback without an episode, likewise.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how much.")] = False,
    config: ConfigFlag = None,
) -> None:
    """Delete old episodes now; what may still be learned from stays, however old it is."""
    from server.commands import record  # noqa: PLC0415 - for this command only
    from server.pruner import said  # noqa: PLC0415

    done = record.prune(
        _settings({"config": config}),
        keep_days=days, keep_parked_days=parked_days, is_trial=dry_run,
    )  # fmt: skip
    _print(said(done, is_trial=dry_run))


@app.command()
def train(config: ConfigFlag = None) -> None:
    """Train once on what is ready; progress is shown. A running server proves what comes of it."""
    settings = _settings({"config": config})
    command = [sys.executable, "-m", "trainer", "--once"]
    done = subprocess.run(  # noqa: S603 - our own module
        command, env={**os.environ, **settings.shared_environment()}, check=False
    )
    raise typer.Exit(done.returncode)


def _assignments(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise CommandError(f"--set is {key!r}; expected section.key=value")
    return {key: value for key, _, value in pairs}


def _settings(flags: dict[str, Any]) -> Settings:
    try:
        return load_settings(flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CommandError(f"setting {place or 'of this server'}: {first['msg']}") from error
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(f"settings: {error}") from error


def _client(config: Path | None, url: str | None) -> Client:
    return Client(_settings({"config": config}), url)


def _print(shown: Any) -> None:
    Console().print(shown)


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold red]error[/] {escape(message)}")
    sys.exit(1)
