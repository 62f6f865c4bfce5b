"""How evenly experts are loaded: pure functions of counted assignments, one number for each layer.

Shape letters: L sparse layers, E experts. Where a layer has counted nothing the result is NaN: nothing is known.
"""

from typing import NamedTuple

import numpy as np


class Balance(NamedTuple):
    """What is reported of the loads of all layers, each `(L,)` float64."""

    max_vio: np.ndarray
    load_cv: np.ndarray
    load_entropy: np.ndarray


def balance_of(counts: np.ndarray) -> Balance:
    """Return all measures of the assignments `(L, E)` that each expert got."""
    return Balance(max_violation(counts), coefficient_of_variation(counts), normalized_entropy(counts))


def load_shares(counts: np.ndarray) -> np.ndarray:
    """Return each expert's share of its layer's assignments, `(L, E)` float64."""
    counts = np.asarray(counts, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def max_violation(counts: np.ndarray) -> np.ndarray:
    """Return `max(load) / mean(load) - 1` (Wang et al. 2024, arXiv 2408.15664, eq. 4): 0 when balanced, at most E - 1.

    Args:
        counts: `(L, E)` assignments to each expert.

    Returns:
        `(L,)` float64.
    """
    return load_shares(counts).max(axis=-1) * counts.shape[-1] - 1


def coefficient_of_variation(counts: np.ndarray) -> np.ndarray:
    """Return `std(load) / mean(load)`, over all experts: 0 when balanced, at most sqrt(E - 1).

    Shazeer et al. 2017 (arXiv 1701.06538, eq. 7) punish its square. Arguments and result as in `max_violation`.
    """
    return load_shares(counts).std(axis=-1) * counts.shape[-1]


def normalized_entropy(counts: np.ndarray) -> np.ndarray:
    """Return the entropy of the load over `log(E)`: 1 when balanced, 0 when one expert gets everything.

    Arguments and result as in `max_violation`; a single expert is balanced.
    """
    shares = load_shares(counts)
    if counts.shape[-1] == 1:
        return np.where(np.isnan(shares[..., 0]), np.nan, 1.0)
    # p * log(p) goes to 0 with p; NaN stays NaN.
    logs = np.log(np.where(shares == 0, 1.0, shares))
    return -(shares * logs).sum(axis=-1) / np.log(counts.shape[-1])


def steps_without_tokens(previous: np.ndarray, counts: np.ndarray, num_steps: int) -> np.ndarray:
    """Return for how many steps each expert has had no token.

    It is known between two log entries only whether an expert got one, so a token anywhere in between starts anew.

    Args:
        previous: `(L, E)` int64, the same at the entry before.
        counts: `(L, E)` assignments since then, of all ranks.
        num_steps: optimizer steps since then.

    Returns:
        `(L, E)` int64.
    """
    return np.where(np.asarray(counts) > 0, 0, previous + num_steps)
