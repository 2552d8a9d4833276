"""The database's tables, as SQLModel classes.

Rows are neither the domain's types (`feedback.types`) nor anybody's wire shapes: conversions stand
beside the SQL that needs them. Schema changes go through `feedback/migrations`; a test compares.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlmodel import Field, SQLModel

ID_LENGTH = 200
"""Longest id, name or key that is stored, in characters."""
SHORT_TASK = f"length(task_key) <= {ID_LENGTH}"
"""Episodes whose task feedback can name."""
HAS_TASK = "task_key IS NOT NULL"


class EpisodeRow(SQLModel, table=True):
    """One episode. `context_*` describe its ids so far: a turn may be stored as their suffix."""

    __tablename__ = "episode"
    __table_args__ = (
        Index("ix_episode_tenant_started", "tenant", "started_at", "id"),
        Index("ix_episode_tenant_policy_started", "tenant", "policy", "started_at", "id"),
        Index("ix_episode_stop_reason", "stop_reason"),
        # Postgres refuses to index texts of any length; feedback names none that are longer.
        Index(
            "ix_episode_task", "tenant", "task_key", "started_at",
            sqlite_where=text(SHORT_TASK), postgresql_where=text(SHORT_TASK),
        ),
    )  # fmt: skip

    id: str = Field(primary_key=True, max_length=ID_LENGTH)
    tenant: str = Field(max_length=ID_LENGTH)
    policy: str = Field(max_length=ID_LENGTH)
    version: int
    agent: str | None = Field(default=None, max_length=ID_LENGTH)
    task_key: str = Field(sa_column=Column(Text, nullable=False))
    purpose: str = Field(max_length=20)
    temperature: float
    started_at: float
    ended_at: float | None = None
    stop_reason: str | None = Field(default=None, max_length=40)
    n_turns: int = 0
    n_tokens: int = 0
    """Sampled tokens over all turns."""
    has_logprobs: bool = True
    """False once a turn came without log-probabilities."""
    context_length: int = 0
    """Prompt and sampled ids of the last turn."""
    context_digest: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    """Digest of those ids, packed."""
    labels: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """`Episode.metadata`: that name is taken in a SQLModel class."""
    owner: str | None = Field(default=None, max_length=ID_LENGTH)
    """The server that runs it, as long as its lease lasts; None: nobody, for example a run that
    waits."""


class ServerLeaseRow(SQLModel, table=True):
    """One server that is alive, as far as it has said so."""

    __tablename__ = "server_lease"

    owner: str = Field(primary_key=True, max_length=ID_LENGTH)
    expires_at: float


class AgentRunRow(SQLModel, table=True):
    """What an agent's episode needs beyond its turns to go on after its server died."""

    __tablename__ = "agent_run"
    __table_args__ = (
        Index("ix_agent_run_state", "state", "waits_until"),
        Index("ix_agent_run_webhook", "webhook_due_at"),
    )

    episode_id: str = Field(primary_key=True, foreign_key="episode.id", max_length=ID_LENGTH)
    tenant: str = Field(max_length=ID_LENGTH)
    state: str = Field(max_length=20)
    """queued, running, waiting or ended."""
    is_background: bool
    """Whether it was asked for without waiting on its answer: its end is told by webhook."""
    is_durable: bool
    """Whether it goes on if its server dies: in the background, or once it has waited."""
    request: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    cancel_requested: bool
    waits_until: float | None = None
    webhook_due_at: float | None = None
    """When the next attempt to tell its end is due; None: there is nothing to tell."""
    webhook_attempts: int


class AgentCallRow(SQLModel, table=True):
    """One tool call of a run, from its intent to its answer."""

    __tablename__ = "agent_call"
    __table_args__ = (Index("ix_agent_call_id", "id"),)

    episode_id: str = Field(primary_key=True, foreign_key="episode.id", max_length=ID_LENGTH)
    id: str = Field(primary_key=True, max_length=ID_LENGTH)
    turn: int
    place: int
    """Among the turn's calls."""
    state: str = Field(max_length=20)
    repeatable: bool
    """Whether it may be made again if nobody knows whether it was made."""
    status: str | None = Field(default=None, max_length=20)
    result: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    seconds: float
    decided_by: str | None = Field(default=None, max_length=ID_LENGTH)
    reason: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    decided_at: float | None = None


class TurnRow(SQLModel, table=True):
    """One turn. Ids are uint32, log-probabilities float32, little-endian, packed."""

    __tablename__ = "turn"

    episode_id: str = Field(primary_key=True, foreign_key="episode.id", max_length=ID_LENGTH)
    index: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    extends: bool
    """Whether `prompt_ids` is what follows the turn before, or the whole prompt."""
    prompt_ids: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    token_ids: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    logprobs: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))
    text: str = Field(sa_column=Column(Text, nullable=False))
    stop_reason: str = Field(max_length=40)
    tool_calls: list[dict[str, Any]] = Field(
        default_factory=list, sa_column=Column(JSON, nullable=False)
    )
    fault: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    started_at: float
    seconds: float


class FeedbackRow(SQLModel, table=True):
    """One feedback event. No foreign key: feedback may come before its episode."""

    __tablename__ = "feedback"
    __table_args__ = (
        UniqueConstraint("tenant", "source", "event_id", name="uq_feedback_event"),
        Index("ix_feedback_episode", "tenant", "episode_id"),
        Index(
            "ix_feedback_task", "tenant", "task_key", "event_time",
            sqlite_where=text(HAS_TASK), postgresql_where=text(HAS_TASK),
        ),
    )  # fmt: skip

    id: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    )
    """One is taken for every statement that arrives, repeats included."""
    tenant: str = Field(max_length=ID_LENGTH)
    source: str = Field(max_length=ID_LENGTH)
    event_id: str = Field(max_length=ID_LENGTH)
    kind: str = Field(max_length=20)
    episode_id: str | None = Field(default=None, max_length=ID_LENGTH)
    task_key: str | None = Field(default=None, max_length=ID_LENGTH)
    worse_id: str | None = Field(default=None, max_length=ID_LENGTH)
    metric: str = Field(max_length=ID_LENGTH)
    value: float | None = None
    turn: int | None = None
    comment: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    correction: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    event_time: float
    received_at: float
    key_id: str | None = Field(default=None, max_length=ID_LENGTH)


class TrainingItemRow(SQLModel, table=True):
    """Where one episode stands on its way through training.

    The primary key is the guarantee that none is trained on twice: one row, in one state, held by
    at most one run. States: running, touched (its reward must be worked out again), pending (no
    reward yet), ready, claimed, trained, dropped. Evaluation and shadow episodes have no row.
    """

    __tablename__ = "training_item"
    __table_args__ = (
        Index(
            "ix_training_item_state", "policy", "state", "version", "matures_at", "waiting_since"
        ),
        Index("ix_training_item_run", "run_id"),
    )

    episode_id: str = Field(primary_key=True, foreign_key="episode.id", max_length=ID_LENGTH)
    policy: str = Field(max_length=ID_LENGTH)
    version: int
    state: str = Field(max_length=20)
    ended_at: float | None = None
    reward: float | None = None
    matures_at: float | None = None
    """When the reward counts; while it is pending, when it is worth another look."""
    waiting_since: float | None = None
    """When it matured or its last outcome arrived, whichever was later."""
    source: str | None = Field(default=None, max_length=ID_LENGTH)
    """The only source whose word the reward rests on; None: several, or none."""
    key_id: str | None = Field(default=None, max_length=ID_LENGTH)
    """The only API key that it rests on, likewise."""
    drop_reason: str | None = Field(default=None, max_length=40)
    run_id: int | None = Field(default=None, foreign_key="training_run.id")


class TrainingLineRow(SQLModel, table=True):
    """One adapter line. Claims lock this row, and it counts what was dropped."""

    __tablename__ = "training_line"

    policy: str = Field(primary_key=True, max_length=ID_LENGTH)
    reward_digest: str = Field(default="", max_length=64)
    """Which reward spec the stored rewards were worked out with."""
    fence: int = 0
    """The highest fencing token given out."""
    dropped: dict[str, int] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """Episodes by reason, ever."""
    dropped_since: dict[str, int] = Field(
        default_factory=dict, sa_column=Column(JSON, nullable=False)
    )
    """Those since the last claim, which the next one reports."""


class TrainingRunRow(SQLModel, table=True):
    """One claim on a batch and what came of it. Active until `finished_at` is set."""

    __tablename__ = "training_run"
    __table_args__ = (Index("ix_training_run_policy", "policy", "finished_at"),)

    id: int | None = Field(default=None, primary_key=True)
    policy: str = Field(max_length=ID_LENGTH)
    owner: str = Field(max_length=ID_LENGTH)
    fence: int
    lease_expires_at: float
    state: str = Field(max_length=40)
    live_version: int
    version: int | None = None
    n_episodes: int
    dropped: dict[str, int] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    figures: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    reason: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    started_at: float
    finished_at: float | None = None


class ApiKeyRow(SQLModel, table=True):
    """One API key, by its public id. The secret is not here."""

    __tablename__ = "api_key"
    __table_args__ = (Index("ix_api_key_tenant", "tenant", "created_at"),)

    id: str = Field(primary_key=True, max_length=ID_LENGTH)
    name: str = Field(max_length=ID_LENGTH)
    tenant: str = Field(max_length=ID_LENGTH)
    scopes: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    digest: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None


class AmendmentRow(SQLModel, table=True):
    """An episode of a used batch that more was said about since: what the next batch is told.

    One row an episode. `run_id` is the run that is told at present; `again` says that still more
    arrived meanwhile.
    """

    __tablename__ = "amendment"
    __table_args__ = (Index("ix_amendment_policy", "policy", "run_id"),)

    episode_id: str = Field(primary_key=True, foreign_key="episode.id", max_length=ID_LENGTH)
    policy: str = Field(max_length=ID_LENGTH)
    run_id: int | None = Field(default=None, foreign_key="training_run.id")
    again: bool = False
    reward: float | None = None
    """What that run is told it is worth; None: not known any more."""


class RulingRow(SQLModel, table=True):
    """Whether a source's word on a metric of a policy counts. Append-only: the last one holds."""

    __tablename__ = "ruling"
    __table_args__ = (
        UniqueConstraint("tenant", "policy", "source", "metric", "sequence", name="uq_ruling"),
        Index("ix_ruling_policy", "policy"),
    )

    id: int | None = Field(default=None, primary_key=True)
    tenant: str = Field(max_length=ID_LENGTH)
    policy: str = Field(max_length=ID_LENGTH)
    source: str = Field(max_length=ID_LENGTH)
    metric: str = Field(max_length=ID_LENGTH)
    sequence: int
    """1, 2, ... by source and metric: whoever writes one has seen all before it."""
    verdict: str = Field(max_length=20)
    actor: str = Field(max_length=ID_LENGTH)
    reason: str = Field(sa_column=Column(Text, nullable=False))
    figures: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    at: float


def _table(name: str) -> Table:
    return SQLModel.metadata.tables[name]


EPISODE = _table("episode")
TURN = _table("turn")
FEEDBACK = _table("feedback")
ITEM = _table("training_item")
LINE = _table("training_line")
RUN = _table("training_run")
KEY = _table("api_key")
SERVER_LEASE = _table("server_lease")
AGENT_RUN = _table("agent_run")
AGENT_CALL = _table("agent_call")
AMENDMENT = _table("amendment")
RULING = _table("ruling")
