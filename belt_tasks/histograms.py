"""Histograms that add up: those of parts are, added, exactly that of the whole, whatever the numbers are.

Bins are as wide as a power of two, and begin at multiples of their width, so that a coarser histogram follows from a
finer one. The width is the smallest with which MOST_BINS bins reach from the least number to the greatest: nothing
has to be known of them beforehand, whether they are probabilities or the values of a regression.

Shape letters: D numbers, B bins.
"""

import math
from typing import Self

import numpy as np
import numpy.typing as npt

from belt_tasks.specs import Spec

MOST_BINS = 256
FINEST = -30
MOST_INDEX = 2**52  # so that every bin's number is exact in a float


class Histogram(Spec):
    """How many numbers lie in each bin; bin i covers [i * width, (i + 1) * width)."""

    exponent: int = FINEST
    """The width is 2 ** exponent."""
    first: int = 0
    """The bin that counts[0] counts."""
    counts: tuple[int, ...] = ()
    """The first and the last are not 0; none where there is no number."""

    @classmethod
    def of(cls, values_D: npt.ArrayLike) -> Self:
        """Count numbers, which must be finite."""
        values_D = np.asarray(values_D, dtype=np.float64)
        if len(values_D) == 0:
            return cls()
        least, most = float(values_D.min()), float(values_D.max())
        exponent = max(FINEST, math.frexp(max(abs(least), abs(most)))[1] - 53)
        while not _fits(_bin_of(least, exponent), _bin_of(most, exponent)):
            exponent += 1
        first = _bin_of(least, exponent)
        index_D = np.floor(np.ldexp(values_D, -exponent))
        index_D = np.where(values_D < 0, np.minimum(index_D, -1), index_D)  # -1e-300 may have become 0
        return cls(exponent=exponent, first=first, counts=tuple(np.bincount((index_D - first).astype(int)).tolist()))

    def __add__(self, other: Self) -> Self:
        """Both together."""
        if not other.counts or not self.counts:
            return self if self.counts else other
        exponent = max(self.exponent, other.exponent)
        while True:
            one, two = self.coarsened(exponent), other.coarsened(exponent)
            first, stop = min(one.first, two.first), max(one.stop, two.stop)
            if _fits(first, stop - 1):
                counts_B = one.counts_from(first, stop) + two.counts_from(first, stop)
                return type(self)(exponent=exponent, first=first, counts=tuple(counts_B.tolist()))
            exponent += 1

    @property
    def stop(self) -> int:
        """One past the last bin."""
        return self.first + len(self.counts)

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent)

    def coarsened(self, exponent: int) -> Self:
        """The same numbers in wider bins."""
        if not self.counts or exponent <= self.exponent:
            return self
        shift = exponent - self.exponent
        index_B = (self.first + np.arange(len(self.counts))) >> min(shift, 62)
        counts_B = np.bincount(index_B - index_B[0], weights=self.counts).astype(np.int64)
        return type(self)(exponent=exponent, first=int(index_B[0]), counts=tuple(counts_B.tolist()))

    def counts_from(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Counts of bins [first, stop), which reach as far as this histogram at least."""
        counts_B = np.zeros(stop - first, dtype=np.int64)
        counts_B[self.first - first : self.stop - first] = self.counts
        return counts_B


def aligned(
    one: Histogram, two: Histogram, *, most_bins: int = MOST_BINS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two histograms in the same bins: B + 1 edges, and B counts of each.

    Args:
        one: a histogram.
        two: another; one of the two counts something.
        most_bins: B at most, 2 or more.
    """
    exponent = max(histogram.exponent for histogram in (one, two) if histogram.counts)
    while True:
        parts = [histogram.coarsened(exponent) for histogram in (one, two)]
        filled = [part for part in parts if part.counts]
        first, stop = min(part.first for part in filled), max(part.stop for part in filled)
        if stop - first <= most_bins:
            break
        exponent += 1
    counts = [part.counts_from(first, stop) if part.counts else np.zeros(stop - first, np.int64) for part in parts]
    return np.ldexp(np.arange(first, stop + 1, dtype=np.float64), exponent), counts[0], counts[1]


def _bin_of(value: float, exponent: int) -> int:
    index = math.floor(math.ldexp(value, -exponent))
    return min(index, -1) if value < 0 else index


def _fits(first: int, last: int) -> bool:
    return last - first < MOST_BINS and max(abs(first), abs(last)) <= MOST_INDEX
