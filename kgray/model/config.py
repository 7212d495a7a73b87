"""What the model is made of: one choice a slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from kgray.config import configuration, option
from kgray.errors import ConfigError

Ablation = Literal["text_only", "graph_only"]


@configuration
class TextTowerConfig:
    """From a language model's vector to the model's space."""

    kind: Literal["frozen", "none"] = option(
        "frozen", "frozen: a trained projection of the stored text vectors; none: the model sees no text."
    )
    hidden: int = option(512, "Width of the projection's hidden layer; 0 makes it one linear map.")
    dropout: float = option(0.1, "Dropout inside the projection.")

    def __post_init__(self) -> None:
        _fraction("dropout", self.dropout)
        if self.hidden < 0:
            raise ConfigError("hidden", self.hidden, "a width, or 0 for a linear map")


@configuration
class StructureConfig:
    """A learned vector an entity."""

    kind: Literal["embedding", "none"] = option(
        "embedding",
        "embedding: one trained vector an entity; none: entities are known by text and neighbours only.",
    )
    drop: float = option(
        0.1,
        "Share of entities whose vector is withheld in a step, so that the model learns to do without it.",
    )
    init_scale: float = option(0.02, "Standard deviation of the initial vectors.")

    def __post_init__(self) -> None:
        _fraction("drop", self.drop)
        _positive("init_scale", self.init_scale)


@configuration
class GnnConfig:
    """Messages from sampled neighbours."""

    kind: str = option("attention", "Convolution: none, attention, compgcn, gat, gcn, gin, rgcn, sage.")
    composition: Literal["multiply", "subtract", "add"] = option(
        "multiply",
        "How a neighbour and the relation to it become one message; rgcn has its own way.",
    )
    fanouts: tuple[int, ...] = option(
        (10,), "Neighbours drawn an entity, a number a layer, nearest hop first; -1: all."
    )
    inference_fanouts: tuple[int, ...] = option(
        (64,), "The same when states are computed for ranking and serving; drawn once, with a fixed seed."
    )
    remove: Literal["edge", "pair"] = option(
        "edge",
        "What carries no message in a training step. edge: the triples it asks for, both ways; pair: every triple "
        "between the two entities of one of them, right where asked pairs are never adjacent (FB15k-237, or new "
        "entities whose reverse edges are not known either).",
    )
    heads: int = option(4, "Attention heads (attention, gat).")
    dropout: float = option(0.1, "Dropout of messages and attention.")

    def __post_init__(self) -> None:
        _fraction("dropout", self.dropout)
        _positive("heads", self.heads)
        for key in ("fanouts", "inference_fanouts"):
            numbers = getattr(self, key)
            if not numbers or any(n == 0 or n < -1 for n in numbers):
                raise ConfigError(key, list(numbers), "positive numbers, or -1 for all neighbours")
        if len(self.fanouts) != len(self.inference_fanouts):
            raise ConfigError(
                "inference_fanouts", list(self.inference_fanouts), f"{len(self.fanouts)} numbers, one a layer"
            )

    @property
    def layers(self) -> int:
        return 0 if self.kind == "none" else len(self.fanouts)


@configuration
class ObjectiveConfig:
    """What training asks of the scores."""

    kind: Literal["one_vs_all", "sampled_softmax"] = option(
        "sampled_softmax",
        "Candidates of a query. one_vs_all: every entity; sampled_softmax: a sample, whatever the loss.",
    )
    loss: str = option(
        "softmax",
        "What is asked of the candidates' scores. softmax: the true one's share of all; bce: true or not, each on its "
        "own; self_adversarial: the same, hard negatives counting more; margin: the true one above the others.",
    )
    negatives: int = option(2048, "sampled_softmax: uniform negatives a step, besides the batch's own entities.")
    label_smoothing: float = option(0.0, "softmax, bce: probability spread over all candidates.")
    all_answers: bool = option(
        False, "bce: whether a query's other training answers are true as well (KvsAll); if not they are left out."
    )
    margin: float = option(
        1.0,
        "margin: how far the true one must be above others. self_adversarial: the negated score at which a fact is as "
        "likely true as not; 6 to 24 are usual for distances (transe, rotate), 0 for the others.",
    )
    temperature: float = option(1.0, "self_adversarial: how sharply hard negatives count more; 0: all alike.")
    relation_weight: float = option(
        0.1,
        "Weight of predicting the relation of (head, ?, tail) besides the entity (Chen et al. 2021); 0 is off.",
    )
    n3: float = option(0.0, "Weight of the nuclear 3-norm of structural vectors (Lacroix et al. 2018).")

    def __post_init__(self) -> None:
        _fraction("label_smoothing", self.label_smoothing)
        for key in ("relation_weight", "n3"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "a weight of 0 or more")
        if self.negatives < 0:
            raise ConfigError("negatives", self.negatives, "a number of entities, 0 or more")
        for key in ("margin", "temperature"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "a number of 0 or more")
        if self.label_smoothing and self.loss in ("margin", "self_adversarial"):
            raise ConfigError("label_smoothing", self.label_smoothing, f"0, as the loss {self.loss} has no labels")
        if self.all_answers and self.loss != "bce":
            raise ConfigError("all_answers", self.all_answers, f"false, as the loss {self.loss} has one true answer")


@configuration
class DecodingConfig:
    """Shape of the decoders that have one."""

    norm: int = option(2, "transe: the 1- or the 2-norm of h + r - t.")
    hidden: int = option(512, "mlp, lstm: width of hidden layers; transformer: of its feed-forward layers.")
    layers: int = option(1, "mlp, lstm, transformer: how many.")
    heads: int = option(4, "transformer: attention heads.")
    channels: int = option(16, "conve: filters.")
    dropout: float = option(0.1, "mlp, transformer, lstm, conve: dropout inside.")

    def __post_init__(self) -> None:
        _fraction("dropout", self.dropout)
        if self.norm not in (1, 2):
            raise ConfigError("norm", self.norm, "1 or 2")
        for key in ("hidden", "layers", "heads", "channels"):
            _positive(key, getattr(self, key))


@configuration
class ModelConfig:
    """Slots of the fused model."""

    dim: int = option(256, "Width of entity states and relation vectors.")
    text: TextTowerConfig = option(TextTowerConfig, "Text tower.")
    structure: StructureConfig = option(StructureConfig, "Structural vectors.")
    fusion: str = option(
        "gated",
        "How text and structure become one vector: concat, cross_attention, gated, lstm, weighted, late (text alone).",
    )
    gnn: GnnConfig = option(GnnConfig, "Graph network.")
    decoder: str = option(
        "complex",
        "How query and candidate meet. complex, distmult: a product of three; rotate, transe: a distance; conve, lstm, "
        "mlp, transformer: a network makes the query.",
    )
    decoding: DecodingConfig = option(DecodingConfig, "Shape of the decoders that have one.")
    late_structure: bool = option(
        True,
        "Whether structural vectors also meet in a decoder of their own, with a loss of their own; ranking adds its "
        "score to the fused one, at a weight found on validation triples.",
    )
    query_hidden: int = option(
        512, "Width of the hidden layer that makes a state the head of a query; 0 uses the state as it is."
    )
    dropout: float = option(0.1, "Dropout of entity states and, but for distances, of queries.")
    objective: ObjectiveConfig = option(ObjectiveConfig, "Training objective.")

    def __post_init__(self) -> None:
        _fraction("dropout", self.dropout)
        if self.dim < 2 or self.dim % 2:
            raise ConfigError("dim", self.dim, "an even number")
        if self.query_hidden < 0:
            raise ConfigError("query_hidden", self.query_hidden, "a width, or 0 for no layer")
        if self.gnn.kind != "none" and self.dim % self.gnn.heads:
            raise ConfigError("gnn.heads", self.gnn.heads, f"a divisor of dim ({self.dim})")
        if self.decoder == "transformer" and self.dim % self.decoding.heads:
            raise ConfigError("decoding.heads", self.decoding.heads, f"a divisor of dim ({self.dim})")
        if self.text.kind == "none" and self.structure.kind == "none":
            raise ConfigError(
                "structure.kind",
                "none",
                "'embedding', as text.kind is none too: nothing would tell entities apart",
            )

    @property
    def structure_alone(self) -> bool:
        """Whether the structural view is all there is: a fused view of the same table would say nothing else."""
        return self.late_structure and self.text.kind == "none" and self.gnn.kind == "none"


def ablation(config: ModelConfig, which: Ablation) -> ModelConfig:
    """The same model without its graph side (text_only) or without its text side (graph_only)."""
    if which == "text_only":
        return replace(config, structure=replace(config.structure, kind="none"), gnn=replace(config.gnn, kind="none"))
    return replace(
        config,
        text=replace(config.text, kind="none"),
        structure=replace(config.structure, kind="embedding", drop=0.0),
    )


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(key, value, "a number from 0 up to, but not including, 1")


def _positive(key: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(key, value, "a number above 0")
