"""Rules as columns, one of them as an object, and as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kgray.reasoning.facts import Int64

HOPS = 3
NONE = -1


@dataclass(frozen=True)
class Rule:
    """One rule; relations 0..2R-1, those from R on are reciprocals.

    id: its row in the Rules. body: one to three relations, a path from X to Y; of a constant rule the one relation.
    constant: c of ``r(X, c) <- ...``, None for a path rule. body_constant: c' of ``r'(X, c')``, None for "some entity".
    support: facts it predicts. body_size: pairs (or, of constant rules, entities X) its body holds of.
    """

    id: int
    relation: int
    body: tuple[int, ...]
    constant: int | None
    body_constant: int | None
    support: int
    body_size: int
    confidence: float


@dataclass(frozen=True)
class Rules:
    """n rules. relation, constant, body_constant, support, body_size (n,) int64, body (n, 3) int64, -1 where there is
    none; confidence (n,) float64.

    A path rule concludes a real relation (0..R-1) and predicts heads as well as tails: read from Y to X it is the rule
    of the reciprocal, with the same confidence. A constant rule may conclude a reciprocal: r+R(X, c) is r(c, X).
    Ordered by relation, path rules first, then by falling confidence; never two of the same content.
    """

    relation: Int64
    body: Int64
    constant: Int64
    body_constant: Int64
    support: Int64
    body_size: Int64
    confidence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.relation)

    def __getitem__(self, index: int) -> Rule:
        body = tuple(int(r) for r in self.body[index] if r != NONE)
        constant, body_constant = int(self.constant[index]), int(self.body_constant[index])
        return Rule(
            id=int(index),
            relation=int(self.relation[index]),
            body=body,
            constant=None if constant == NONE else constant,
            body_constant=None if body_constant == NONE else body_constant,
            support=int(self.support[index]),
            body_size=int(self.body_size[index]),
            confidence=float(self.confidence[index]),
        )

    @property
    def hops(self) -> Int64:
        """Atoms of each body, (n,) int64."""
        atoms: Int64 = (self.body != NONE).sum(axis=1)
        return atoms

    @property
    def is_path(self) -> NDArray[np.bool_]:
        """(n,) whether the rule names no entity."""
        unnamed: NDArray[np.bool_] = self.constant == NONE
        return unnamed

    def take(self, chosen: NDArray[np.bool_] | Int64) -> Rules:
        """The rules at the given places."""
        return Rules(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def ordered(self) -> Rules:
        """The same rules in the order the class promises, whatever order they were found in."""
        keys = (self.body_constant, self.constant, *self.body.T[::-1], -self.support, -self.confidence)
        return self.take(np.lexsort((*keys, ~self.is_path, self.relation)))

    @classmethod
    def join(cls, parts: Iterable[Rules]) -> Rules:
        """All rules of the parts, ordered."""
        parts = [cls.empty(), *parts]
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        return cls(**columns).ordered()

    @classmethod
    def empty(cls) -> Rules:
        none = np.zeros(0, dtype=np.int64)
        return cls(none, np.zeros((0, HOPS), dtype=np.int64), none, none, none, none, np.zeros(0))

    def to_table(self) -> pa.Table:
        """One row a rule; body_1 to body_3 and the constants are -1 where there is none."""
        columns = {f.name: pa.array(getattr(self, f.name)) for f in fields(self) if f.name != "body"}
        for hop in range(HOPS):
            columns[f"body_{hop + 1}"] = pa.array(np.ascontiguousarray(self.body[:, hop]))
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Rules:
        """The inverse of :meth:`to_table`; KeyError when a column lacks."""
        columns = {f.name: table[f.name].to_numpy() for f in fields(cls) if f.name != "body"}
        body = np.stack([table[f"body_{hop + 1}"].to_numpy() for hop in range(HOPS)], axis=1)
        return cls(body=body, **columns)


def pack(num_relations: int, bodies: Int64) -> Int64:
    """Bodies (n, length) as single numbers in base 2R, (n,) int64."""
    keys = np.zeros(len(bodies), dtype=np.int64)
    for column in bodies.T:
        keys = keys * (2 * num_relations) + column
    return keys


def unpack(num_relations: int, keys: Int64, length: int) -> Int64:
    """The inverse of :func:`pack`, (n, length) int64."""
    size = max(2 * num_relations, 1)
    return np.stack([keys // size**step % size for step in range(length - 1, -1, -1)], axis=1)


def rule_text(rule: Rule, entities: Sequence[str], relations: Sequence[str]) -> str:
    """For people: ``parent(X, Y) <- child(Y, X) [0.83, 120 of 140]``: confidence, support, body size.

    entities: N names, relations: R names. Atoms of reciprocal relations are turned round.
    """
    real = len(relations)

    def atom(relation: int, a: str, b: str) -> str:
        if relation >= real:
            relation, a, b = relation - real, b, a
        return f"{relations[relation]}({a}, {b})"

    if rule.constant is None:
        steps = ["X", *(f"Z{i}" if len(rule.body) > 2 else "Z" for i in range(1, len(rule.body))), "Y"]
        head = atom(rule.relation, "X", "Y")
        body = ", ".join(atom(r, steps[i], steps[i + 1]) for i, r in enumerate(rule.body))
    else:
        head = atom(rule.relation, "X", entities[rule.constant])
        other = "some Z" if rule.body_constant is None else entities[rule.body_constant]
        body = atom(rule.body[0], "X", other)
    return f"{head} <- {body} [{rule.confidence:.2f}, {rule.support} of {rule.body_size}]"
