"""Documents of several sources, drawn by weight.

The weights are probabilities of documents, not of tokens: a source of long documents gives more tokens than its weight.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets

from .documents import DocumentReader

_DRAWS = 1000


class DocumentMixture:
    """Draw documents from several readers; each goes on with its next epoch when it is through.

    Args:
        readers (sequence of `DocumentReader`): the sources.
        weights (sequence of `float`): above 0; document for document, a source is drawn with its share of their sum.
        seed (sequence of `int`): of the draws.
    """

    def __init__(self, readers: Sequence[DocumentReader], weights: Sequence[float], seed: tuple[int, ...]) -> None:
        self._readers, self._seed = readers, seed
        self._shares = shares_of(weights)
        self._num_drawn = 0

    @property
    def epoch(self) -> int:
        """How many times every document of every source has been handed out."""
        return min(reader.epoch for reader in self._readers)

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last document; JSON can hold it."""
        return {"drawn": self._num_drawn, "sources": [reader.state_dict() for reader in self._readers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken."""
        self._num_drawn = state["drawn"]
        for reader, place in zip(self._readers, state["sources"], strict=True):
            reader.load_state_dict(place)

    def __iter__(self) -> Iterator:
        if len(self._readers) == 1:
            yield from self._readers[0]
            return
        iterators = [iter(reader) for reader in self._readers]
        while True:
            # Drawn in blocks that each have a seed of their own, so that a place among the draws is one number.
            block, first = divmod(self._num_drawn, _DRAWS)
            draws = np.random.default_rng([*self._seed, block]).choice(len(iterators), _DRAWS, p=self._shares)
            for source in draws[first:]:
                self._num_drawn += 1
                yield next(iterators[source])


def mix(datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """Draw the rows of several datasets by weight until each row of each was drawn at least once."""
    if len(datasets) == 1:
        return datasets[0]
    shares = shares_of(weights)
    return interleave_datasets(list(datasets), list(shares), seed=seed, stopping_strategy="all_exhausted")


def shares_of(weights: Sequence[float]) -> np.ndarray:
    """Return the weights divided by their sum."""
    return np.asarray(weights) / np.sum(weights)
