"""The cheapest division of a network in two, by augmenting paths (Edmonds and Karp, J. ACM 19(2), 1972)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable

SOURCE, SINK = "source", "sink"
UNBOUNDED = 1 << 30


class Network:
    """Directed edges with whole capacities between any hashable points."""

    def __init__(self) -> None:
        self._capacity: defaultdict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Adds to the capacity from `start` to `end`."""
        self._capacity[start][end] = self._capacity[start].get(end, 0) + capacity
        self._capacity[end].setdefault(start, 0)

    def cut(self) -> tuple[int, set[Hashable]]:
        """The least total capacity that separates source and sink, and the points on the source's side.

        Of several cheapest divisions, the one with the fewest points on that side. Uses the network up.
        """
        total = 0
        while True:
            before = self._reach()
            if SINK not in before:
                return total, set(before)
            total += self._augment(before)

    def _reach(self) -> dict[Hashable, Hashable]:
        """Points that spare capacity reaches, breadth first, each with the one before it."""
        before: dict[Hashable, Hashable] = {SOURCE: SOURCE}
        queue: deque[Hashable] = deque([SOURCE])
        while queue and SINK not in before:
            point = queue.popleft()
            for following, capacity in self._capacity[point].items():
                if capacity and following not in before:
                    before[following] = point
                    queue.append(following)
        return before

    def _augment(self, before: dict[Hashable, Hashable]) -> int:
        path: list[tuple[Hashable, Hashable]] = [(before[SINK], SINK)]
        while path[-1][0] != SOURCE:
            path.append((before[path[-1][0]], path[-1][0]))
        flow = min(self._capacity[start][end] for start, end in path)
        for start, end in path:
            self._capacity[start][end] -= flow
            self._capacity[end][start] += flow
        return flow
