"""Is a new version worse than the one it would replace? A test that may be looked at at any time.

Two arms of bounded outcomes, compared by betting (Waudby-Smith and Ramdas 2024, "Estimating means
of bounded random variables by betting"): a capital that cannot be expected to grow while a
hypothesis holds refutes it by growing. Pure functions of arrays; what is done about it, and where
the outcomes come from, is the caller's. Formulas and measured power are in `docs/algorithms.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_PRIOR = 10.0
"""Weight, in outcomes, of the first guess: a mean of 1/2, a variance of 1/4."""
_STAKE = 0.75
"""Largest part of the capital that one outcome can cost: below 1, so that none is the last."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Outcomes of both arms in the order in which they became known; all arrays are [..., N]."""

    values: Floats
    """In [0, 1]."""
    is_canary: Bools
    shares: Floats
    """The probability, in (0, 1), with which each was given to the canary."""


@dataclass(frozen=True, slots=True)
class Capitals:
    """Log capitals after each outcome, [..., N]. Each starts at 0."""

    worse: Floats
    """Against "the canary is as good or better": grows while the canary is worse."""
    fine: Floats
    """Against "the canary is worse by `margin` or more": grows while it is not."""


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
    """The verdict on one canary, arrays [N], at error probability `alpha` for each of two claims.

    `target` is the loss of mean that the bets on "worse" are sized for; larger and smaller ones are
    found too, only later than they could be. Whatever the number of looks, an equal canary is
    called worse with probability `alpha` at most, and one that is worse by `margin` is called fine
    with that probability at most.
    """
    found = capitals(outcomes, target=target, margin=margin)
    worse, fine = _evidence(found.worse, alpha), _evidence(found.fine, alpha)
    return Verdict(worse >= 1, fine >= 1 and worse < 1, worse, fine)


def capitals(outcomes: Outcomes, *, target: float, margin: float) -> Capitals:
    """Both capitals of every canary in the batch.

    With share s, centre c (the mean of what came before, of both arms) and outcome x, the term

        z = (x - c) / s  if it is the canary's,  -(x - c) / (1 - s)  if it is the live version's

    has the mean "canary minus live", whatever c is. The capitals are prod(1 - l z) and
    prod(1 + l' (z + margin)); the bets l and l' are fixed before x and its arm are known.
    """
    x, s = outcomes.values, outcomes.shares
    center = _before(x, 0.5)
    variance = _before((x - center) ** 2, 0.25) / (s * (1 - s))
    z = (x - center) * np.where(outcomes.is_canary, 1 / s, -1 / (1 - s))
    highest = np.maximum((1 - center) / s, center / (1 - s))
    lowest = np.maximum(center / s, (1 - center) / (1 - s)) - margin
    on_worse = np.minimum(target / (variance + target**2), _STAKE / highest)
    on_fine = np.minimum(margin / (variance + margin**2), _STAKE / np.maximum(lowest, _STAKE))
    return Capitals(
        worse=np.cumsum(np.log1p(-on_worse * z), axis=-1),
        fine=np.cumsum(np.log1p(on_fine * (z + margin)), axis=-1),
    )


def first_at(log_capital: Floats, enough: float) -> npt.NDArray[np.intp]:
    """The place of the first value that is `enough`, [...]; N if there is none."""
    reached = log_capital >= enough
    length = log_capital.shape[-1]
    if not length:
        return np.zeros(log_capital.shape[:-1], np.intp)
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1), length)


def _before(values: Floats, guess: float) -> Floats:
    """The mean of the values before each place, with the first guess as `_PRIOR` of them."""
    summed = np.cumsum(values, axis=-1) - values + _PRIOR * guess
    return summed / (np.arange(values.shape[-1]) + _PRIOR)


def _evidence(log_capital: Floats, alpha: float) -> float:
    highest = float(log_capital.max(initial=0.0))
    return alpha * math.exp(min(highest, 50.0))
