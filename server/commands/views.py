"""What the commands print: the API's answers as tables and texts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

_COLOURS = {
    "live": "green",
    "loaded": "cyan",
    "candidate": "yellow",
    "canary": "magenta",
    "rejected": "red",
    "rolled_back": "red",
    "retired": "dim",
    "quarantined": "yellow",
    "released": "green",
    "discarded": "red",
    "training": "green",
    "triggered": "green",
    "down": "red",
}


def status_view(training: Json, policies: Sequence[Json], url_models: Sequence[Json]) -> Group:
    """What is live, and how its training stands."""
    names = ", ".join(model["id"] for model in url_models if model["kind"] != "version")
    trainer = training["trainer"]
    return Group(
        Text(f"models   {names}"),
        Text(f"trainer  {_trainer(trainer)}"),
        *_pauses(training["pauses"]),
        *(_training_panel(policy) for policy in training["policies"]),
        *(Text(f"policy {p['id']}: {p['live']}") for p in policies),
    )


def releases_view(policy: Json) -> Group:
    """Versions with lineage, then the events."""
    versions = _table("version", "state", "parent", "published", "figures")
    for version in policy["versions"]:
        versions.add_row(
            version["id"],
            _state(version["state"]) + (" pinned" if version["pinned"] else ""),
            version.get("parent") or "-",
            _ago(version.get("created_at")),
            _figures(version.get("metrics", {})),
        )
    events = _table("when", "version", "state", "by", "reason")
    for event in policy["events"][-20:]:
        events.add_row(
            _ago(event["at"]),
            f"v{event['version']}",
            _state(event["state"]) + ("" if event["share"] is None else f" {event['share']:.3g}"),
            escape(event["actor"]),
            escape(event["reason"]),
        )
    back = policy["rollback_to"]
    hint = f"hone rollback {policy['id']}  would lead to {back}" if back else "nothing to roll back"
    live = Text(f"live: {policy['live']}", style="bold")
    return Group(live, *_canary(policy["canary"]), versions, events, Text(hint))


def _canary(canary: Json | None) -> list[Text]:
    if canary is None:
        return []
    text = f"canary: {canary['id']} on {canary['share']:.3g} of new episodes: {canary['why']}"
    lines = [Text(text, style="magenta")]
    if canary["shadow"]:
        lines.append(Text.from_markup(f"shadow: {_figures(canary['shadow'], 9)}"))
    return lines


def episodes_view(episodes: Sequence[Json]) -> RenderableType:
    """One line an episode."""
    if not episodes:
        return Text("no episodes yet")
    table = _table("episode", "began", "model", "agent", "task", "turns", "stopped", "feedback")
    for episode in episodes:
        table.add_row(
            episode["id"],
            _ago(episode["started_at"]),
            episode["model"],
            episode["agent"] or "-",
            escape(episode["task_key"]),
            str(episode["n_turns"]),
            episode["stop_reason"] or "running",
            _figures(episode["feedback"]),
        )
    return table


def quarantine_view(rulings: Sequence[Json]) -> RenderableType:
    """Rulings in force, newest first."""
    if not rulings:
        return Text("every source counts")
    table = _table("number", "policy", "source", "metric", "verdict", "when", "by", "reason")
    for ruling in rulings:
        table.add_row(
            str(ruling["id"]),
            ruling["policy"],
            escape(ruling["source"]),
            escape(ruling["metric"]),
            _state(ruling["verdict"]),
            _ago(ruling["at"]),
            escape(ruling["by"]),
            escape(ruling["reason"]),
        )
    return table


def episode_view(episode: Json) -> Group:
    """The turns as they were said, the tools' answers, and what it was worth."""
    reward = episode["reward"]
    value = "pending" if reward["value"] is None else f"{reward['value']:.3f}"
    head = Text.assemble(
        (episode["id"], "bold"),
        f"  {episode['model']}  {episode['task_key']}  {episode['purpose']}\n",
        f"stopped: {episode['stop_reason'] or 'not yet'}   reward: ",
        (value, "bold"),
        f" ({reward['reason']})",
    )
    said = [
        Text(f"feedback {_said(e)} by {e['source']} {_ago(e['event_time'])}")
        for e in episode["feedback"]
    ]
    return Group(head, *(_turn_panel(turn) for turn in episode["turns"]), *said)


def keys_view(keys: Sequence[Json]) -> RenderableType:
    """One line a key, without its secret."""
    if not keys:
        return Text("no keys yet; make one with `hone keys create NAME`")
    table = _table("key", "name", "tenant", "scopes", "made", "used", "state")
    for key in keys:
        table.add_row(
            key["id"],
            escape(key["name"]),
            key["tenant"],
            " ".join(key["scopes"]),
            _ago(key["created_at"]),
            _ago(key["last_used_at"]),
            _key_state(key),
        )
    return table


def _key_state(key: Json) -> str:
    if key["revoked_at"] is not None:
        return "[red]revoked[/]"
    if key["expires_at"] is None:
        return "usable"
    left = key["expires_at"] - time.time()
    return f"usable for {left / 86_400:.1f} d" if left > 0 else "[red]expired[/]"


def _said(event: Json) -> str:
    """One feedback event, in a few words."""
    where = "" if event["turn"] is None else f" of turn {event['turn']}"
    match event["kind"]:
        case "preference":
            verdict = "preference taken back: " if event["value"] is None else ""
            return f"{verdict}better than {event['worse_id']}"
        case "correction":
            return f"correction{where}: {event['correction']}"
        case "comment":
            return f"comment{where}: {event['comment']}"
        case _:
            return f"{event['metric']}{where} = {event['value']}"


def _turn_panel(turn: Json) -> Panel:
    body = Text(turn["text"].strip())
    for call in turn["tool_calls"]:
        style = "green" if call["status"] == "ok" else "red"
        body.append(f"\n{call['name']} {json.dumps(call['arguments'])}", "cyan")
        body.append(f"\n  {call['status']}: {call['result']}", style)
    if turn["fault"]:
        body.append(f"\nfault: {turn['fault']}", "red")
    tokens = len(turn["token_ids"])
    title = f"turn {turn['index']}  {tokens} tokens  {turn['seconds']:.2f} s"
    return Panel(body, title=title, title_align="left", border_style="dim")


def _training_panel(policy: Json) -> Panel:
    counts = ", ".join(
        f"{value} {name.replace('_', ' ')}"
        for name, value in policy["counts"].items()
        if name != "dropped" and value
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_row("live", policy["live"])
    rows.add_row("state", _state(policy["state"]))
    rows.add_row("why", escape(policy["why"]))
    rows.add_row("next", escape(policy["next_trigger"]))
    rows.add_row("episodes", counts or "none yet")
    for run in policy["runs"][:3]:
        said = escape(f"{run['state']}, {run['n_episodes']} episodes {_figures(run['figures'])}")
        rows.add_row(f"run {run['id']}", said)
        why = run["reason"] or run["figures"].get("outcome")
        if why:
            rows.add_row("", f"[yellow]{escape(why)}[/]")
    return Panel(rows, title=f"training {policy['policy']}", title_align="left", expand=False)


def _trainer(trainer: Json) -> str:
    if not trainer["enabled"]:
        return "off"
    if trainer["alive"]:
        return f"running (process {trainer['pid']}, {trainer['restarts']} restarts)"
    return f"down (last exit status {trainer['last_exit']}); it is started again"


def _pauses(pauses: Json) -> list[Text]:
    """Nothing where serving is never paused."""
    if not pauses["enabled"]:
        return []
    now = "paused now" if pauses["paused"] else f"{pauses['count']} so far"
    text = (
        f"pauses   {now}, {pauses['seconds']:.1f} s in all, longest {pauses['longest_seconds']:.2f}"
    )
    if pauses["fault"]:
        return [Text(text), Text(f"         none any more: {pauses['fault']}", style="red")]
    return [Text(text)]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str | None) -> str:
    colour = _COLOURS.get(state or "")
    return f"[{colour}]{state}[/]" if colour else state or "-"


def _figures(figures: Json, most: int = 6) -> str:
    parts = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in figures.items()
        if isinstance(value, int | float | str)
    ]
    return escape(" ".join(parts[:most]))


def _ago(at: float | None) -> str:
    if at is None:
        return "-"
    seconds = max(0.0, time.time() - at)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
