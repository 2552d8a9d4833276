"""What is counted while an update runs, and what the figures of a run are called.

Sums over sampled tokens, taken in microbatch by microbatch. docs/algorithms.md says what each one
means; whether one of them ends the update is the learner's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from trainer.algorithms import Loss, TokenBatch
from trainer.model import TokenLogprobs
from trainer.surrogates import divergence


@dataclass(slots=True)
class Gaps:
    """How far the engine is from this model on the same tokens under the same version."""

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0
    k3: float = 0.0

    @classmethod
    def together(cls, parts: Sequence[Gaps]) -> Gaps:
        """Over all tokens of several ranks."""
        return cls(
            sum(part.tokens for part in parts),
            sum(part.total for part in parts),
            max(part.largest for part in parts),
            sum(part.k3 for part in parts),
        )

    def add(self, log_ratio: Tensor) -> None:
        """`log_ratio` [N]: this model's log-probability minus the engine's.

        What is not finite is passed over: nobody sampled it, as in a correction, or it ends the
        update by itself.
        """
        log_ratio = log_ratio[log_ratio.isfinite()]
        if not len(log_ratio):
            return
        self.tokens += len(log_ratio)
        self.total += float(log_ratio.abs().sum())
        self.largest = max(self.largest, float(log_ratio.abs().max()))
        self.k3 += float((log_ratio.exp() - 1 - log_ratio).sum())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)

    def summary(self) -> dict[str, float]:
        return {
            "engine_gap": self.largest,
            "engine_gap_mean": self.mean,
            "engine_gap_k3": self.k3 / max(1, self.tokens),
            "engine_gap_tokens": float(self.tokens),
        }


@dataclass(slots=True)
class Figures:
    """Running sums over the trained tokens of an update; `summary` says what they mean."""

    tokens: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    kl_max: float = 0.0
    stopped_by_kl: bool = False
    gaps: Gaps = field(default_factory=Gaps)
    ratio_max: float = 0.0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "kl", "entropy", "ratio", "clipped"), 0.0)
    )
    kl_base: float | None = None
    """None: the algorithm needs no reference."""
    dropped_off_policy: int = 0
    """Episodes over `kl_stop` before any step. They count in none of the others."""
    masked: int = 0
    """Tokens of bad episodes that are too far from who sampled them."""
    replayed_tokens: int = 0
    """Of earlier batches. They count in none of the others."""
    critic: dict[str, float] = field(default_factory=dict)
    """Of a value head, where there is one."""

    @classmethod
    def together(cls, parts: Sequence[Figures]) -> Figures:
        """Of several ranks, each of which counted its share; of what they did together, as steps,
        all say the same."""
        bases = [part.kl_base for part in parts if part.kl_base is not None]
        return replace(
            parts[0],
            tokens=sum(part.tokens for part in parts),
            gaps=Gaps.together([part.gaps for part in parts]),
            ratio_max=max(part.ratio_max for part in parts),
            sums={name: sum(part.sums[name] for part in parts) for name in parts[0].sums},
            kl_base=sum(bases) if bases else None,
            masked=sum(part.masked for part in parts),
            replayed_tokens=sum(part.replayed_tokens for part in parts),
        )

    def add(
        self, loss: Loss, scored: TokenLogprobs, tokens: TokenBatch, *, fresh: Tensor
    ) -> Tensor:
        """Take in a microbatch. `fresh` [N]: not of a stale episode.

        Returns each token's divergence from who sampled it, [N].
        """
        logprobs, fresh = scored.logprobs.detach(), fresh.to(scored.logprobs.device)
        log_ratio = logprobs - tokens.behaviour
        ratio, strayed = log_ratio.exp(), divergence(tokens.behaviour, logprobs)
        self.tokens += len(ratio)
        self.sums["loss"] += float(loss.value.detach())
        self.sums["kl"] += float(strayed.sum())
        self.sums["entropy"] += float(scored.entropy.sum())
        self.sums["ratio"] += float(ratio.sum())
        self.sums["clipped"] += float(loss.clipped.sum())
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        if self.steps == 0:
            # Nothing has moved yet: what differs is the engine from this model.
            self.gaps.add(log_ratio[fresh])
        if tokens.reference is not None:
            left = float(divergence(logprobs, tokens.reference).sum())
            self.kl_base = (self.kl_base or 0.0) + left
        return strayed

    def summary(self) -> dict[str, float]:
        tokens = max(1, self.tokens)
        extra = {} if self.kl_base is None else {"kl_base": self.kl_base / tokens}
        return (
            extra
            | self.critic
            | self.gaps.summary()
            | {
                "loss": self.sums["loss"] / max(1, self.steps),
                "kl": self.sums["kl"] / tokens,
                "kl_max": self.kl_max,
                "entropy": self.sums["entropy"] / tokens,
                "ratio_mean": self.sums["ratio"] / tokens,
                "ratio_max": self.ratio_max,
                "clip_fraction": self.sums["clipped"] / tokens,
                "grad_norm": self.grad_norm / max(1, self.steps),
                "stopped_by_kl": float(self.stopped_by_kl),
                "dropped_off_policy": float(self.dropped_off_policy),
                "masked_fraction": self.masked / tokens,
                "replayed_tokens": float(self.replayed_tokens),
                "steps": float(self.steps),
                "trained_tokens": float(self.tokens),
            }
        )
