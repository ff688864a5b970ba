"""Search for the timesteps of a few-step sampler: a coordinate search among those of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from .student import ROUNDS, TRIES, Fit, Student

FRACTIONS = (3, 6, 12)
"""Fractions of a step by which timesteps are moved, larger moves first."""
CALLS = 9
"""The search stops after this many network calls, times n (n - 1); most searches stop earlier."""


def max_network_calls(n: int, outputs: int = 3) -> int:
    """Upper bound of the network calls per batch for the search and fit of n steps.

    Args:
        n: the step count.
        outputs: maximum number of outputs that a step combines.
    """
    of_changes = sum(min(i, outputs - 1) * (n - 1 - i) for i in range(n))
    return CALLS * n * (n - 1) + 2 * n + ROUNDS * (of_changes + TRIES * n)


def search_timesteps(student: Student, start: Sequence[int], among: Sequence[int]) -> Fit:
    """Search the teacher's timesteps for those whose fitted weights match the teacher best.

    Every timestep except the first is moved to neighbors as long as the final error decreases; weights are fitted for
    each candidate.

    Args:
        student: fits weights.
        start: timesteps to begin with, from T-1 down, all of them in `among`.
        among: the teacher's timesteps.
    """
    n, fit, searching = len(start), student.fit(start), _Search(student, start, among)
    for move in dict.fromkeys(max(1, round(len(among) / n / part)) for part in FRACTIONS):
        error = float("inf")
        while fit.error < error:
            error = fit.error
            for k in range(n - 1, 0, -1):
                for offset in (move, -move):
                    fit = searching.move_timestep(fit, k, offset)
    return fit


class _Search:
    """State of the search: what was tried, and the remaining number of calls."""

    def __init__(self, student: Student, start: Sequence[int], among: Sequence[int]) -> None:
        self._student, self._among = student, list(among)
        self._place = {timestep: place for place, timestep in enumerate(among)}
        self._tried = {tuple(start)}
        self._last_call = student.calls + CALLS * len(start) * (len(start) - 1)

    def move_timestep(self, fit: Fit, k: int, offset: int) -> Fit:
        """The k-th timestep moved by `offset` places among the teacher's, repeated as long as the error decreases."""
        while (timesteps := self._next_candidate(fit.timesteps, k, offset)) is not None:
            other = self._student.fit(timesteps, like=fit)
            if not other.error < fit.error:
                break
            fit = other
        return fit

    def _next_candidate(self, timesteps: Sequence[int], k: int, offset: int) -> list[int] | None:
        """Timesteps with the k-th moved; None where they are out of order, tried before, or no calls are left."""
        places = [self._place[timestep] for timestep in timesteps]
        places[k] += offset
        after = places[k + 1] if k + 1 < len(places) else len(self._among)
        new = [self._among[place] for place in places] if places[k - 1] < places[k] < after else []
        if not new or tuple(new) in self._tried or self._student.calls >= self._last_call:
            return None
        self._tried.add(tuple(new))
        return new
