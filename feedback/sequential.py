"""Is a new version worse than the one it would replace? A test that may be looked at at any time.

Outcomes of both arms are matched to differences, and bets are laid on these (Waudby-Smith and
Ramdas 2024, "Estimating means of bounded random variables by betting"): a capital that cannot be
expected to grow while a hypothesis holds refutes it by growing. Pure functions of arrays; what is
done about it, and where outcomes come from, is the caller's. `docs/algorithms.md` has the power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

_PRIOR = 10.0
"""Weight, in differences, of the first guess at a mean of theirs."""
_GUESS = 0.25
"""The variance of a coin."""
_STAKE = 0.5
"""Largest part of the capital that one difference can cost: below 1, so that none is the last."""
_MOST = 50.0
"""Log capital beyond which nothing is added to what is known."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Outcomes of both arms, [N], in the order in which they became known."""

    values: Floats
    """In [0, 1]."""
    is_canary: Bools
    shares: Floats
    """The canary's share of traffic, in (0, 1), when each began; it changes at each stage."""


@dataclass(frozen=True, slots=True)
class Capitals:
    """Log capitals after each difference, [M]; they start at 0."""

    worse: Floats
    """Against "the canary is as good or better": grows while the canary is worse."""
    fine: Floats
    """Against "the canary is worse by `margin` or more": grows while it is not."""
    known_at: Places
    """The place in the outcomes at which each difference was known."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the outcomes of one canary say."""

    worse: bool
    """It was shown to be worse."""
    fine: bool
    """It was shown not to be worse by the margin; never true of one that was shown to be worse."""
    worse_evidence: float
    """The largest capital so far, in units of what decides: 1 is enough, `alpha` is none."""
    fine_evidence: float


def judge(outcomes: Outcomes, *, target: float, margin: float, alpha: float) -> Verdict:
    """The verdict on one canary at error probability `alpha` for each of its two claims.

    `target` is the loss of mean that the bets on "worse" are sized for; larger and smaller ones are
    found too, only later than they could be. Whatever the number of looks, an equal canary is
    called worse with probability `alpha` at most, and one that is worse by `margin` is called fine
    with that probability at most.
    """
    found = capitals(outcomes, target=target, margin=margin)
    worse, fine = _evidence(found.worse, alpha), _evidence(found.fine, alpha)
    return Verdict(worse >= 1, fine >= 1 and worse < 1, worse, fine)


def capitals(outcomes: Outcomes, *, target: float, margin: float) -> Capitals:
    """Both capitals: prod(1 - l d) and prod(1 + l' (d + margin)) over the differences d.

    The bets are fixed before d is known, by the differences before it: l = loss / mean(d^2) and
    l' = margin / mean((d + margin)^2), the best ones if the mean of d is -loss, and if it is 0. The
    loss is `target`, or what is already plain if that is more, so that a collapse is seen at once.
    No d in [-1, 1] costs more than `_STAKE` of a capital.
    """
    d, known_at = differences(outcomes)
    square = _mean_before(d**2, _GUESS)
    error = np.sqrt(square / (np.arange(len(d)) + _PRIOR))
    loss = np.maximum(target, -_mean_before(d, 0.0) - error)
    on_worse = np.minimum(loss / square, _STAKE)
    highest = _STAKE / max(1 - margin, _STAKE)
    on_fine = np.minimum(margin / _mean_before((d + margin) ** 2, _GUESS), highest)
    return Capitals(
        worse=np.cumsum(np.log1p(-on_worse * d)),
        fine=np.cumsum(np.log1p(on_fine * (d + margin))),
        known_at=known_at,
    )


def differences(outcomes: Outcomes) -> tuple[Floats, Places]:
    """Canary minus live, in [-1, 1], of outcomes matched in order, and when each was known.

    At a share of 1/4, the canary's first outcome is matched with the live version's first three,
    and so on, each stage by itself. So nothing follows from who answered how many, which may be due
    to a slow version or a missing adapter, and both sides of a difference are of about one time.
    """
    found, places = [np.zeros(0)], [np.zeros(0, np.intp)]
    for share in np.unique(outcomes.shares).tolist():
        here = outcomes.shares == share
        theirs = np.flatnonzero(here & outcomes.is_canary)
        live = np.flatnonzero(here & ~outcomes.is_canary)
        # As many of each as the share says: otherwise one side's queue would grow, and age.
        ratio = Fraction(share).limit_denominator(100)
        few, many = max(1, ratio.numerator), max(1, ratio.denominator - ratio.numerator)
        n = min(len(theirs) // few, len(live) // many)
        theirs, live = theirs[: n * few].reshape(n, few), live[: n * many].reshape(n, many)
        found.append(outcomes.values[theirs].mean(axis=1) - outcomes.values[live].mean(axis=1))
        places.append(np.maximum(theirs[:, -1], live[:, -1]))
    known_at = np.concatenate(places)
    order = np.argsort(known_at)
    return np.concatenate(found)[order], known_at[order]


def _mean_before(values: Floats, guess: float) -> Floats:
    """The mean of the values before each place, with the first guess as `_PRIOR` of them."""
    summed = np.cumsum(values) - values + _PRIOR * guess
    means: Floats = summed / (np.arange(len(values)) + _PRIOR)
    return means


def _evidence(log_capital: Floats, alpha: float) -> float:
    return alpha * math.exp(min(float(log_capital.max(initial=0.0)), _MOST))
