"""Explanations for people, and as plain JSON: names beside ids, nothing longer than a screen."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kgray.reasoning.explain import Fact, FiredRule
from kgray.reasoning.prediction import Addend, Explanation, Neighbours
from kgray.reasoning.rules import rule_text

WIDTH = 116
_ADDENDS, _RULES, _GROUNDINGS, _PATHS, _FACTS = 6, 3, 1, 3, 6
_LONGEST = 40
_SPACES = str.maketrans("_-", "  ")


@dataclass(frozen=True)
class Vocabulary:
    """External ids and names of entities and relations, in dense-id order."""

    entity_ids: Sequence[str]
    entity_names: Sequence[str]
    relation_ids: Sequence[str]
    relation_names: Sequence[str]

    def entity(self, number: int) -> str:
        """``name (id)``, or the id alone where the name says no more."""
        return _label(self.entity_ids[number], self.entity_names[number])

    def relation(self, number: int) -> str:
        """The same of a relation, its id as :attr:`between` has it."""
        return _label(self.relation_ids[number], self.relation_names[number], self.between[number])

    @cached_property
    def between(self) -> Sequence[str]:
        """Ids of relations as they stand between two entities: of a long one its end, which says the most, where no
        other relation ends so."""
        ends = [_end(name) for name in self.relation_ids]
        often = Counter(ends)
        return [end if often[end] == 1 else name for end, name in zip(ends, self.relation_ids, strict=True)]

    def answer(self, one: Explanation, number: int) -> str:
        """A candidate of the explained query."""
        return self.relation(number) if one.task == "relation" else self.entity(number)

    def fact(self, fact: Fact) -> str:
        """``head -relation-> tail``."""
        return f"{self.entity(fact.head)} -{self.between[fact.relation]}-> {self.entity(fact.tail)}"

    def rule(self, fired: FiredRule) -> str:
        return rule_text(fired.rule, self.entity_names, self.between)


def render(one: Explanation, words: Vocabulary, number: int) -> str:
    """The explanation of one answer, a screen at most, no line longer than WIDTH."""
    triple = words.fact(Fact(one.head, one.relation, one.tail))
    marks = [f"score {one.score:.4f}", f"filtered rank {one.rank:g} of {one.candidates}"]
    if one.probability is not None:
        marks.append(f"probability {one.probability:.3f}")
    if one.in_set is not None and one.coverage is not None:
        marks.append(f"{'in' if one.in_set else 'not in'} the {one.coverage:.0%} answer set")
    marks.append("a known fact" if one.known else "not known")
    lines = [f"{number}. {triple}   [{one.task}?]", "   " + "   ".join(marks)]
    lines += _addends(one, words)
    lines += _rules(one, words)
    lines += _paths(one, words)
    lines += _neighbours(one.neighbours, words)
    return "\n".join(part for line in lines for part in _folded(line))


def _addends(one: Explanation, words: Vocabulary) -> list[str]:
    lines = []
    if one.rival is None:
        lines.append("   what the score is the sum of; there is no other answer to compare with")
    else:
        rival = words.answer(one, one.rival)
        lines.append(f"   what the score is the sum of, and the difference to {rival}, score {one.rival_score:.4f}")
    lines += _table(one.addends, one.score, one.rival_score)
    if one.first_ranking:
        lines.append("   what the first ranking's own score is the sum of")
        lines += _table(one.first_ranking, None, None)
    return lines


def _table(addends: Sequence[Addend], total: float | None, rival: float | None) -> list[str]:
    shown = list(addends[:_ADDENDS])
    rest = addends[_ADDENDS:]
    if rest:
        contrasts = [a.contrast for a in rest if a.contrast is not None]
        shown.append(Addend(f"{len(rest)} others", sum(a.value for a in rest), sum(contrasts) if contrasts else None))
    if total is not None:
        shown.append(Addend("sum", total, None if rival is None else total - rival))
    return [f"     {_short(a.name, 48):<48}{a.value:>12.4f}{_signed(a.contrast):>12}" for a in shown]


def _rules(one: Explanation, words: Vocabulary) -> list[str]:
    if one.rules_score is None:
        return []
    if not one.rules:
        return ["   no rule predicts it"]
    lines = [f"   rules, score {one.rules_score:.4f}: what each adds, [confidence, support of body], its facts"]
    for fired in one.rules[:_RULES]:
        begin = f"     {fired.contribution:>7.4f}  "
        lines += textwrap.wrap(words.rule(fired), WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))
        for grounding in fired.groundings[:_GROUNDINGS]:
            lines += _packed([words.fact(fact) for fact in grounding], "              ")
    if len(one.rules) > _RULES:
        lines.append(f"              and {len(one.rules) - _RULES} more rules, weaker ones")
    return lines


def _paths(one: Explanation, words: Vocabulary) -> list[str]:
    if not one.paths:
        return []
    lines = ["   paths, by how much the path model's score grows with their weight"]
    for path in one.paths[:_PATHS]:
        steps = [words.fact(Fact(step.head, step.relation, step.tail)) for step in path.steps]
        lines += _packed(steps, f"     {path.weight:>+7.4f}  ")
    return lines


def _neighbours(found: Neighbours, words: Vocabulary) -> list[str]:
    if found.why_not is not None:
        return [f"   facts beside the query: not left out, {found.why_not}"]
    if not found.facts:
        return ["   facts beside the query: there are none"]
    lines = [
        f"   facts beside the query, by how much the score of member {found.member}, {found.score:.4f}, falls without "
        f"them ({min(len(found.facts), _FACTS)} of {found.examined})"
    ]
    return lines + [f"     {n.change:>+7.4f}  {words.fact(n.fact)}" for n in found.facts[:_FACTS]]


def _packed(parts: Sequence[str], begin: str) -> list[str]:
    """The parts on as few lines as hold them, the first beginning with ``begin``, the others indented as far."""
    lines = [begin + parts[0]] if parts else []
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) < WIDTH:
            lines[-1] += "; " + part
        else:
            lines.append(" " * len(begin) + part)
    return lines


def to_json(one: Explanation, words: Vocabulary) -> dict[str, Any]:
    """Everything of the explanation, ids and names instead of numbers; plain lists and dicts."""

    def entity(number: int) -> dict[str, str]:
        return {"id": words.entity_ids[number], "name": words.entity_names[number]}

    def relation(number: int) -> dict[str, str]:
        return {"id": words.relation_ids[number], "name": words.relation_names[number]}

    def fact(head: int, relation: int, tail: int) -> list[str]:
        return [words.entity_ids[head], words.relation_ids[relation], words.entity_ids[tail]]

    def addends(parts: Iterable[Addend]) -> list[dict[str, Any]]:
        return [{"name": a.name, "value": a.value, "contrast": a.contrast} for a in parts]

    rival = one.rival
    rival_answer = None if rival is None else relation(rival) if one.task == "relation" else entity(rival)
    return {
        "task": one.task,
        "head": entity(one.head),
        "relation": relation(one.relation),
        "tail": entity(one.tail),
        **{key: getattr(one, key) for key in ("score", "rank", "candidates", "known", "probability", "in_set")},
        "rival": None if rival_answer is None else {**rival_answer, "score": one.rival_score},
        "addends": addends(one.addends),
        "first_ranking": addends(one.first_ranking),
        "rules_score": one.rules_score,
        "rules": [
            {
                "rule": rule_text(fired.rule, words.entity_names, words.relation_ids),
                "confidence": fired.rule.confidence,
                "support": fired.rule.support,
                "body_size": fired.rule.body_size,
                "contribution": fired.contribution,
                "groundings": [[fact(f.head, f.relation, f.tail) for f in one] for one in fired.groundings],
            }
            for fired in one.rules
        ],
        "paths": [
            {"weight": path.weight, "facts": [fact(s.head, s.relation, s.tail) for s in path.steps]}
            for path in one.paths
        ],
        "neighbours": {
            "member": one.neighbours.member,
            "score": one.neighbours.score,
            "examined": one.neighbours.examined,
            "facts": [
                {"fact": fact(n.fact.head, n.fact.relation, n.fact.tail), "change": n.change}
                for n in one.neighbours.facts
            ],
            "why_not": one.neighbours.why_not,
        },
    }


def _label(external: str, name: str, shown: str | None = None) -> str:
    # An id that is only another spelling of the name says enough.
    same = name.casefold().translate(_SPACES) == external.casefold().translate(_SPACES)
    shown = _short(external) if shown is None else shown
    return shown if same else f"{_short(name)} ({shown})"


def _short(text: str, longest: int = _LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _end(text: str) -> str:
    """A long text from one of its / or # on, as much of its end as is no longer than others are."""
    if len(text) <= _LONGEST:
        return text
    ends = (text[place:] for place, letter in enumerate(text) if letter in "/#")
    return next(("..." + end for end in ends if 4 <= len(end) <= _LONGEST - 3), text)


def _folded(line: str) -> list[str]:
    """A line in as many of WIDTH as it takes, the later ones further in."""
    inner = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, WIDTH, subsequent_indent=inner, break_on_hyphens=False) if len(line) > WIDTH else [line]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
