"""The command line of ``jobs.explain``. Floor 6."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kgray.artifact import Artifact, Store
from kgray.errors import ArtifactNotFoundError, UserError
from kgray.pipeline.command import guarded, parser_of
from kgray.pipeline.plan import Work, needed

if TYPE_CHECKING:
    from kgray.model.leave_one_out import LeaveOneOut
    from kgray.serving.predictor import Query

PARTS = ("head", "relation", "tail")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print why the model answers what it answers; the exit status."""
    parser = parser_of("explain")
    parser.add_argument("--head", metavar="ID", help="id or name; two of head, relation, tail ask for the third")
    parser.add_argument("--relation", metavar="ID", help="all three: this triple is explained, asked from either end")
    parser.add_argument("--tail", metavar="ID")
    for end in ("head", "tail"):
        said = f"a {end} that the graph does not have: 'name: description'"
        parser.add_argument(f"--{end}-text", metavar="TEXT", help=said)
    parser.add_argument(
        "--fact", nargs=2, metavar=("RELATION", "TAIL"), action="append", default=[], help="of the new entity, as head"
    )
    parser.add_argument(
        "--fact-of", nargs=2, metavar=("HEAD", "RELATION"), action="append", default=[], help="of it, as tail"
    )
    parser.add_argument("--top", metavar="N", type=int, default=3, help="answers explained, best first (3)")
    parser.add_argument("--filter-known", action="store_true", help="leave out answers known already")
    parser.add_argument("--json", action="store_true", help="no text; everything in the line of JSON, 'explanations'")
    return guarded("explain", parser.parse_args(arguments), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build what is missing, explain, print. Raises UserError for a query that cannot be answered."""
    from kgray.config import load_config, show_config
    from kgray.pipeline import results, steps
    from kgray.pipeline.settings import Settings

    settings = load_config(Settings, options.config, options.overrides)
    if options.show_config:
        print(show_config(settings), end="", flush=True)
        return {"_said": True}
    given = {part: getattr(options, part) for part in PARTS if getattr(options, part) is not None}
    new = new_query(options, given)
    if new is None and len(given) < 2:
        raise UserError(f"give two of --head, --relation, --tail, or all three, not {len(given)}")
    if options.top < 1:
        raise UserError(f"--top must be at least 1, not {options.top}")
    with Work(settings, f"explain {Path(options.config).stem}") as work:
        for step in needed(steps.steps_of(settings), steps.targets_of("explain", settings)):
            work.run(step)
        if new is not None:
            from kgray.pipeline.explain_new import explain_new

            found = explain_new(work.artifacts[steps.ENSEMBLE], new)
        else:
            found = explain(work, given, options.top, filter_known=options.filter_known)
        if not options.json:
            print("\n\n".join(text for text, _ in found), flush=True)
        result = results.result("explain", work) | {"metrics": {"explanations": len(found)}}
        return result | {"explanations": [data for _, data in found] if options.json else None}


def new_query(options: argparse.Namespace, given: dict[str, str]) -> Query | None:
    """The query of an entity given by its text; None where none is. UserError where that leaves no one question."""
    from kgray.serving.predictor import NewEntity, NewFact, Query

    texts = {end: getattr(options, f"{end}_text") for end in ("head", "tail")}
    ends = [end for end, text in texts.items() if text is not None]
    if not ends:
        if options.fact or options.fact_of:
            raise UserError("--fact and --fact-of are facts of a new entity: give its --head-text or --tail-text")
        return None
    if len(ends) > 1 or ends[0] in given or len(given) != 1:
        raise UserError("beside --head-text or --tail-text give exactly one of the two other parts, by --head, ...")
    name, _, description = texts[ends[0]].partition(":")
    if not name.strip():
        raise UserError(f"--{ends[0]}-text must begin with a name, not {texts[ends[0]]!r}")
    facts = [NewFact(relation, tail=tail) for relation, tail in options.fact]
    facts += [NewFact(relation, head=head) for head, relation in options.fact_of]
    parts: dict[str, Any] = given | {ends[0]: NewEntity(name.strip(), description.strip(), tuple(facts))}
    return Query(**parts, top_k=options.top, filter_known=options.filter_known)


def explain(work: Work, given: dict[str, str], top: int, *, filter_known: bool) -> list[tuple[str, dict[str, Any]]]:
    """Text and JSON of each explanation of the model that ``work`` has built."""
    from kgray.model.bundle import Bundle
    from kgray.pipeline.steps import ENSEMBLE
    from kgray.reasoning.prediction import Explainer
    from kgray.reasoning.render import Vocabulary, render, to_json
    from kgray.serving.names import Field, Names

    bundle = Bundle.load(work.artifacts[ENSEMBLE])
    words = Vocabulary(bundle.entity_ids, bundle.entity_names, bundle.relation_ids, bundle.relation_names)
    entities = Names("entity", words.entity_ids, words.entity_names)
    relations = Names("relation", words.relation_ids, words.relation_names)
    ids = {
        part: (relations if part == "relation" else entities).find(cast(Field, part), value).index
        for part, value in given.items()
    }
    # A whole triple has two directions, each with a score of its own; without an entity task there is the third.
    tasks = [part for part in PARTS if part not in ids] or ["tail", "head"]
    for task in tasks:
        if task not in bundle.tasks:
            raise UserError(f"this model cannot tell the {task}, it answers {' and '.join(bundle.tasks)} queries")
    explainer = Explainer(bundle, "fused", leave_one_out(work))
    found = []
    for task in tasks:
        first, second = (ids[part] for part in PARTS if part != task)
        if task in ids:
            candidates = [ids[task]]
        else:
            candidates = explainer.best(task, first, second, top, filter_known=filter_known)
        found += explainer.explain(task, first, second, candidates)
    return [(render(one, words, place + 1), to_json(one, words)) for place, one in enumerate(found)]


def leave_one_out(work: Work) -> LeaveOneOut | str:
    """The means to leave facts out of the main model, or in words why there are none."""
    from kgray.graph.graph import Graph
    from kgray.model.bundle import Bundle
    from kgray.model.leave_one_out import LeaveOneOut, NotExplainableError
    from kgray.text.vectors import load_vectors

    member = Bundle.load(work.artifacts["train"])
    version = member.info.get("vectors")
    found = None if version is None else _find(work.store, f"vectors/{version}")
    vectors = None if found is None else load_vectors(found)
    try:
        return LeaveOneOut.of(member, Graph.load(work.artifacts["ingest"]), vectors)
    except NotExplainableError as error:
        return str(error)


def _find(store: Store, target: str) -> Artifact | None:
    try:
        return store.get(target)
    except ArtifactNotFoundError:
        return None
