"""Makes friends.tsv: an invented social graph, the same bytes for the same seed.

python3 configs/data/social/make.py > configs/data/social/friends.tsv
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence

PEOPLE, CIRCLES = 1000, 25
FIRST, CLOSED, ACROSS = 3000, 3000, 400


def friendships(seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of people, the smaller first. A stochastic block model with overlapping circles, then triadic closure:
    friends of a friend become friends, which is what makes such graphs predictable (Jin, Girvan and Newman 2001)."""
    draw = random.Random(seed)
    circles: list[list[int]] = [[] for _ in range(CIRCLES)]
    for person in range(PEOPLE):
        for circle in draw.sample(range(CIRCLES), draw.choice((1, 1, 2))):
            circles[circle].append(person)
    friends: dict[int, list[int]] = {person: [] for person in range(PEOPLE)}
    found: set[tuple[int, int]] = set()

    def befriend(a: int, b: int) -> bool:
        pair = (min(a, b), max(a, b))
        if a == b or pair in found:
            return False
        found.add(pair)
        friends[a].append(b)
        friends[b].append(a)
        return True

    def until(count: int, meet: Callable[[], Sequence[int]]) -> None:
        while count:
            a, b = meet()
            count -= befriend(a, b)

    def through_a_friend() -> list[int]:
        middle = draw.choice([person for person in draw.sample(range(PEOPLE), 20) if len(friends[person]) > 1])
        return draw.sample(friends[middle], 2)

    until(FIRST, lambda: draw.sample(draw.choice(circles), 2))
    until(ACROSS, lambda: draw.sample(range(PEOPLE), 2))
    until(CLOSED, through_a_friend)
    return sorted(found)


def main() -> None:
    draw = random.Random(1)
    for pair in friendships():
        a, b = draw.sample(pair, 2)
        sys.stdout.write(f"p{a:03d}\tfriend\tp{b:03d}\n")
        if draw.random() < 0.2:  # some say it both ways, as exports do
            sys.stdout.write(f"p{b:03d}\tfriend\tp{a:03d}\n")


if __name__ == "__main__":
    main()
