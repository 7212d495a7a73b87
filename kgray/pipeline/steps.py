"""The steps of kgray: what each job reads, writes, and takes from the configuration. Floor 6.

    input files -> graph (-> encoder) -> vectors -> model(s) -> ensemble -> report
                         \\----------/                     \\-> deployment
    documents   -> corpus                                    query files, ensemble -> predictions

Every room is imported when its step is looked at, so that an up-to-date pipeline loads neither torch nor a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kgray.artifact import Artifact, Draft, Recipe
from kgray.errors import ConfigError
from kgray.lineage.registry import register
from kgray.lineage.tracking import Run, numeric
from kgray.model.config import Ablation, ModelConfig, ablation
from kgray.model.relations_config import RelationsConfig
from kgray.pipeline.plan import Step, Work
from kgray.pipeline.settings import Settings
from kgray.reasoning.config import RulesConfig
from kgray.text.config import TextConfig
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import PseudoConfig, TrainConfig
from kgray.training.families import TrainableConfig
from kgray.training.variations import Cycles, Lesson, Snapshot, Variation

Vary = Callable[[Work], Variation]
"""What sets a training apart, made when the artifacts it may need are there."""

ABLATIONS: tuple[Ablation, ...] = ("text_only", "graph_only")
"""Variants trained and measured beside the model when ``evaluate.ablations`` is on."""

ENSEMBLE = "ensemble"
"""The step whose model is ranked, registered, served and asked in batches."""

PREDICT = "predict"
"""The step that answers files of queries, where there are some."""


def steps_of(settings: Settings) -> list[Step]:
    """The steps this configuration has, deploying apart (see deployment.py), in an order they can run in."""
    steps = [Step("ingest", (), _ingest_recipe, _ingest, ("data", "graph"))]
    if settings.data.documents is not None:
        steps.append(Step("corpus", (), _corpus_recipe, _corpus, ("data",)))
    if settings.text is not None:
        steps += _text_steps(settings.text)
    measured, mixed = ablations_of(settings), variants_of(settings)
    for which in ABLATIONS:
        if which in measured or which in mixed:
            steps.append(_train_step(ablation(settings.model, which), settings.train, f" {which}"))
        if which in measured:
            steps.append(_evaluate_step(f"train {which}", f" {which}", ()))
    kept = settings.members.snapshots
    steps.append(_train_step(settings.model, settings.train, "", (lambda _: Cycles(kept)) if kept else None))
    for number in range(1, kept + 1):
        vary = partial(_snapshot, number=number)
        steps.append(_train_step(settings.model, settings.train, f" snapshot {number}", vary, ("train",)))
    for seed in settings.members.seeds:
        steps.append(_train_step(settings.model, replace(settings.train, seed=seed), f" seed {seed}"))
    if settings.members.pseudo is not None:
        vary = partial(_lesson, pseudo=settings.members.pseudo)
        steps.append(_train_step(settings.model, settings.train, " pseudo", vary, ("train",)))
    for name, member in settings.members.models.items():
        steps.append(_train_step(member.model, member.train or settings.train, f" {name}"))
    if settings.members.paths is not None:
        steps.append(_train_step(settings.members.paths.model, settings.members.paths.train, " paths"))
    if settings.members.relations is not None:
        relations = settings.members.relations
        steps.append(_train_step(relations.model, relations.train, " relations"))
    if settings.members.rules is not None:
        recipe, make = partial(_mine_recipe, rules=settings.members.rules), partial(_mine, rules=settings.members.rules)
        steps.append(Step("mine", ("ingest",), recipe, make, ("members",)))
    members = members_of(settings)
    steps.append(
        Step(
            ENSEMBLE,
            ("ingest", *members.values()),
            partial(_ensemble_recipe, members=members),
            partial(_ensemble, members=members),
            ("ensemble",),
            _register,
        )
    )
    steps.append(_evaluate_step(ENSEMBLE, "", measured))
    if settings.predict.queries is not None:
        steps.append(Step(PREDICT, (ENSEMBLE,), _predict_recipe, _predict, ("predict",), _predicted))
    return steps


def _text_steps(text: TextConfig) -> list[Step]:
    embed = partial(_embed_recipe, text=text), partial(_embed, text=text)
    if text.tuning is None:
        return [Step("embed", ("ingest",), *embed, ("text",))]
    made = partial(_pretrain_recipe, text=text, tuning=text.tuning), partial(_pretrain, text=text, tuning=text.tuning)
    return [
        Step("pretrain", ("ingest",), *made, ("text", "train")),
        Step("embed", ("ingest", "pretrain"), *embed, ("text",)),
    ]


def members_of(settings: Settings) -> dict[str, str]:
    """The steps whose models are mixed, by the name a member goes by in reports and explanations."""
    found = {"fused": "train"}
    found |= {which: f"train {which}" for which in variants_of(settings)}
    found |= {f"snapshot {n}": f"train snapshot {n}" for n in range(1, settings.members.snapshots + 1)}
    found |= {f"seed {seed}": f"train seed {seed}" for seed in settings.members.seeds}
    if settings.members.pseudo is not None:
        found["pseudo"] = "train pseudo"
    found |= {name: f"train {name}" for name in settings.members.models}
    if settings.members.paths is not None:
        found["paths"] = "train paths"
    if settings.members.relations is not None:
        found["relations"] = "train relations"
    return found if settings.members.rules is None else found | {"rules": "mine"}


def variants_of(settings: Settings) -> tuple[Ablation, ...]:
    """The variants that are mixed in: without text the model is its own graph-only variant."""
    return () if settings.model.text.kind == "none" else settings.members.variants


def ablations_of(settings: Settings) -> tuple[Ablation, ...]:
    """The ablations that say something: without text the model is its own graph-only variant."""
    if not settings.evaluate.ablations or settings.model.text.kind == "none":
        return ()
    return ABLATIONS


def targets_of(job: str, settings: Settings) -> list[str]:
    """The steps a job is asked for; what they need comes by itself.

    Raises ConfigError for embed and pretrain where there is no text, for pretrain where nothing is tuned, for predict
    where there are no queries.
    """
    names = [step.name for step in steps_of(settings)]
    if job == "pipeline":
        return names
    if job == "ingest":
        return [name for name in names if name in ("ingest", "corpus")]
    if job == "evaluate":
        return [name for name in names if name.partition(" ")[0] == "evaluate"]
    if job in ("embed", "pretrain") and settings.text is None:
        raise ConfigError("text", None, f"a section, as there is nothing to {job} without one")
    if job == "pretrain" and job not in names:
        raise ConfigError("text.tuning", None, "a section, such as {mode: last_layers}: how the encoder is trained")
    if job == PREDICT and job not in names:
        expected = "files of queries: --queries queries.tsv, or predict.queries=queries.tsv"
        raise ConfigError("predict.queries", None, expected)
    return [{"explain": ENSEMBLE, "deploy": ENSEMBLE}.get(job, job)]


def _train_step(
    model: TrainableConfig, train: TrainConfig, suffix: str, vary: Vary | None = None, after: tuple[str, ...] = ()
) -> Step:
    """Training one model. suffix: tells its step from the main one. after: the steps that ``vary`` needs."""
    needs = ("ingest", "embed") if _reads_text(model) else ("ingest",)
    return Step(
        f"train{suffix}",
        (*needs, *after),
        partial(_train_recipe, model=model, train=train, vary=vary),
        partial(_train, model=model, train=train, vary=vary),
        ("model", "train") if vary is None else ("model", "train", "members"),
    )


def _evaluate_step(ranked: str, suffix: str, beside: tuple[str, ...]) -> Step:
    """Measuring the model of step ``ranked``. beside: the variants whose reports are shown in this one's."""
    reports = {which: f"evaluate {which}" for which in beside}
    return Step(
        f"evaluate{suffix}",
        ("ingest", ranked, *reports.values()),
        partial(_evaluate_recipe, ranked=ranked, reports=reports),
        partial(_evaluate, ranked=ranked, reports=reports),
        ("evaluate",),
    )


def _ingest_recipe(work: Work) -> Recipe:
    from kgray.data.ingest import ingest_recipe

    return ingest_recipe(work.store, work.settings.data, work.settings.graph)


def _ingest(work: Work, draft: Draft, run: Run) -> Mapping[str, Any]:
    from kgray.data.ingest import ingest

    return ingest(draft, work.settings.data, work.settings.graph)


def _corpus_recipe(work: Work) -> Recipe:
    from kgray.data.ingest import corpus_recipe

    return corpus_recipe(work.store, work.settings.data)


def _corpus(work: Work, draft: Draft, run: Run) -> Mapping[str, Any]:
    from kgray.data.ingest import ingest_corpus

    return ingest_corpus(draft, work.settings.data)


def _pretrain_recipe(work: Work, text: TextConfig, tuning: TuningConfig) -> Recipe:
    from kgray.training.pretrain import pretrain_recipe

    return pretrain_recipe(work.store, text, tuning, work.settings.train, work.artifacts["ingest"])


def _pretrain(work: Work, draft: Draft, run: Run, text: TextConfig, tuning: TuningConfig) -> Mapping[str, Any]:
    from kgray.pipeline.relay import relay
    from kgray.training.pretrain import pretrain

    with relay(run) as on_metrics:
        graph, reach = work.artifacts["ingest"], work.settings.graph
        return pretrain(draft, work.store, text, tuning, work.settings.train, graph, reach, on_metrics=on_metrics)


def _embed_recipe(work: Work, text: TextConfig) -> Recipe:
    from kgray.text.embed import embed_recipe

    return embed_recipe(work.store, text, work.artifacts["ingest"], work.artifacts.get("pretrain"))


def _embed(work: Work, draft: Draft, run: Run, text: TextConfig) -> Mapping[str, Any]:
    from kgray.text.embed import embed

    return embed(draft, text, work.artifacts["ingest"], work.store, work.artifacts.get("pretrain"))


def _reads_text(model: TrainableConfig) -> bool:
    if isinstance(model, RelationsConfig):
        return model.text
    return isinstance(model, ModelConfig) and model.text.kind != "none"


def _vectors(work: Work, model: TrainableConfig) -> Artifact | None:
    return work.artifacts["embed"] if _reads_text(model) else None


def _lesson(work: Work, pseudo: PseudoConfig) -> Variation:
    return Lesson(work.artifacts["train"], pseudo)


def _snapshot(work: Work, number: int) -> Variation:
    return Snapshot(work.artifacts["train"], number)


def _train_recipe(work: Work, model: TrainableConfig, train: TrainConfig, vary: Vary | None) -> Recipe:
    from kgray.training.distributed import train_recipe

    graph, vectors = work.artifacts["ingest"], _vectors(work, model)
    return train_recipe(work.store, model, train, graph, vectors, vary and vary(work))


def _train(
    work: Work, draft: Draft, run: Run, model: TrainableConfig, train: TrainConfig, vary: Vary | None
) -> Mapping[str, Any]:
    from kgray.pipeline.relay import relay
    from kgray.training import distributed

    graph, vectors = work.artifacts["ingest"], _vectors(work, model)
    with relay(run) as on_metrics:
        return distributed.train(
            draft,
            work.store,
            model,
            train,
            graph,
            vectors,
            vary and vary(work),
            on_metrics=on_metrics,
            reach=work.settings.graph,
        )


def _mine_recipe(work: Work, rules: RulesConfig) -> Recipe:
    from kgray.reasoning.recipe import rules_recipe

    return rules_recipe(rules, work.artifacts["ingest"])


def _mine(work: Work, draft: Draft, run: Run, rules: RulesConfig) -> Mapping[str, Any]:
    from kgray.pipeline.mining import mine

    return mine(draft, rules, work.artifacts["ingest"])


def _ensemble_recipe(work: Work, members: Mapping[str, str]) -> Recipe:
    from kgray.evaluation.ensemble import ensemble_recipe

    return ensemble_recipe(work.settings.ensemble, work.artifacts["ingest"], _artifacts(work, members))


def _ensemble(work: Work, draft: Draft, run: Run, members: Mapping[str, str]) -> Mapping[str, Any]:
    from kgray.evaluation.ensemble import ensemble

    return ensemble(draft, work.settings.ensemble, work.artifacts["ingest"], _artifacts(work, members))


def _register(work: Work, run: Run, model: Artifact) -> None:
    registered = register(work.tracker, run, model, numeric(model.counts))
    if registered is not None:
        run.tag(registered=f"{registered.name}/{registered.number}", alias=registered.alias)


def register_again(work: Work) -> None:
    """Register an ensemble that was up to date, in case MLflow was out of reach when it was made. Nothing
    happens where it is registered, or where this driver has no run in MLflow."""
    model = work.artifacts.get(ENSEMBLE)
    fresh = {outcome.step for outcome in work.outcomes if outcome.status == "done"}
    if work.parent is not None and model is not None and ENSEMBLE not in fresh:
        register(work.tracker, work.parent, model, numeric(model.counts))


def _evaluate_recipe(work: Work, ranked: str, reports: Mapping[str, str]) -> Recipe:
    from kgray.evaluation.evaluate import evaluate_recipe

    model, graph = work.artifacts[ranked], work.artifacts["ingest"]
    return evaluate_recipe(work.store, work.settings.evaluate, model, graph, _artifacts(work, reports))


def _evaluate(
    work: Work, draft: Draft, run: Run, ranked: str, reports: Mapping[str, str]
) -> Mapping[str, Any]:
    from kgray.evaluation.evaluate import evaluate

    model, graph = work.artifacts[ranked], work.artifacts["ingest"]
    return evaluate(draft, work.settings.evaluate, model, graph, _artifacts(work, reports))


def _predict_recipe(work: Work) -> Recipe:
    from kgray.prediction.predict import predict_recipe

    return predict_recipe(work.store, work.settings.predict, work.artifacts[ENSEMBLE])


def _predict(work: Work, draft: Draft, run: Run) -> Mapping[str, Any]:
    from kgray.prediction.predict import predict

    return predict(draft, work.store, work.settings.predict, work.artifacts[ENSEMBLE])


def _predicted(work: Work, run: Run, predictions: Artifact) -> None:
    """What let a broken run resume is not needed once the predictions are published."""
    from kgray.prediction.predict import scratch_name

    work.store.drop_scratch(scratch_name(predictions.version))


def _artifacts(work: Work, steps: Mapping[str, str]) -> dict[str, Artifact]:
    """The artifacts of steps, by the names the steps are given here."""
    return {name: work.artifacts[step] for name, step in steps.items()}
