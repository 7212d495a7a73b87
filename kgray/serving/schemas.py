"""What goes over the wire, as pydantic models: strict types, no unknown fields, examples for OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Term = Annotated[
    str,
    Field(min_length=1, max_length=1024, description="External id, or a name that only one row has."),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NewFactBody(_Body):
    """A fact of a new entity: `relation`, and the other end as `tail` (the new entity is the head) or as `head`."""

    relation: Term
    head: Term | None = None
    tail: Term | None = None

    @model_validator(mode="after")
    def _one_end(self) -> NewFactBody:
        if (self.head is None) == (self.tail is None):
            found = "none" if self.head is None else "both"
            raise ValueError(f"give the other end of the fact, head or tail, not the new entity's own; found {found}")
        return self


class NewEntityBody(_Body):
    """An entity that the graph does not have, by its text and, where any are known, its facts."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    description: Annotated[str, Field(max_length=65536)] = ""
    facts: Annotated[list[NewFactBody], Field(max_length=1000)] = []


TAGS = ("<term>", "<new entity>")
"""What pydantic calls the two forms of an entity in the places of its errors."""


def _form(value: Any) -> str:
    return TAGS[isinstance(value, (dict, NewEntityBody))]


Entity = Annotated[
    Annotated[Term, Tag(TAGS[0])] | Annotated[NewEntityBody, Tag(TAGS[1])],
    Discriminator(_form),
    Field(description="An id or name, or an object that describes an entity the graph does not have."),
]


class PredictRequest(_Body):
    """Two of `head`, `relation`, `tail`; the third, left out or null, is what is asked for."""

    head: Entity | None = None
    relation: Term | None = None
    tail: Entity | None = None
    top_k: Annotated[int, Field(ge=1, description="How many answers, best first.")] = 10
    filter_known: Annotated[
        bool, Field(description="Leave out what train, valid or test hold already; otherwise it is marked.")
    ] = False

    @model_validator(mode="after")
    def _two_of_three(self) -> PredictRequest:
        given = [name for name in ("head", "relation", "tail") if getattr(self, name) is not None]
        if len(given) != 2:
            found = ", ".join(given) or "none"
            raise ValueError(f"give exactly two of head, relation, tail; found {found}")
        return self


class TripleBody(_Body):
    """A triple to score."""

    head: Term
    relation: Term
    tail: Term


class ScoreRequest(_Body):
    """Either one triple (`head`, `relation`, `tail`) or a list of them (`triples`)."""

    head: Term | None = None
    relation: Term | None = None
    tail: Term | None = None
    triples: Annotated[list[TripleBody], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        given = [name for name in ("head", "relation", "tail") if getattr(self, name) is not None]
        if self.triples is not None and given:
            raise ValueError(f"give triples, or one triple, not both; found triples and {', '.join(given)}")
        if self.triples is None and len(given) != 3:
            found = ", ".join(given) or "none"
            raise ValueError(f"give head, relation and tail, or a list called triples; found {found}")
        return self

    def as_list(self) -> list[TripleBody]:
        """The triples asked about, whichever form was used."""
        if self.triples is not None:
            return self.triples
        # The validator above has seen to it that all three are there.
        return [TripleBody.model_construct(head=self.head, relation=self.relation, tail=self.tail)]


class ModelRef(BaseModel):
    """Which model answered; `version` is the version of its artifact."""

    name: str
    version: str


class Item(BaseModel):
    """An entity or a relation."""

    id: Annotated[str | None, Field(description="Null of an entity that the graph does not have.")]
    name: str


class QueryEcho(BaseModel):
    """The query as it was understood: ids resolved, the part asked for null."""

    head: Item | None
    relation: Item | None
    tail: Item | None
    top_k: int
    filter_known: bool


class PredictionBody(BaseModel):
    """One answer; a higher `score` is a better one, scores of different queries do not compare, probabilities do."""

    rank: int
    id: str
    name: str
    score: float
    known: Annotated[bool, Field(description="The graph holds this fact already.")]
    probability: Annotated[
        float | None,
        Field(
            description="How often such an answer is the true one, as validation measured it; of a known fact as if "
            "it were not known. Null where the model is not calibrated."
        ),
    ]
    in_set: Annotated[
        bool | None, Field(description="Whether the answer set holds it. Null where the model is not calibrated.")
    ]


class AnswerSetBody(BaseModel):
    """Of all candidates those likely enough that a share `coverage` of such sets hold the true answer."""

    size: Annotated[
        int,
        Field(description="Answers in the set that the graph does not hold yet; 0: none is likely enough."),
    ]
    coverage: float


class PredictResponse(BaseModel):
    """Ranked answers; equal scores stand in the order of the entity table."""

    model: ModelRef
    query: QueryEcho
    missing: Literal["head", "relation", "tail"]
    predictions: list[PredictionBody]
    answer_set: Annotated[
        AnswerSetBody | None, Field(description="Null where the model is not calibrated.")
    ]
    members: Annotated[
        list[str] | None,
        Field(
            description="Of a query with a new entity the members of the model that could answer; nothing is "
            "calibrated then. Null of other queries, which all members answer."
        ),
    ]


class ScoreBody(BaseModel):
    """The score of a triple: the mean of its score as (head, relation, ?) and as (?, relation, tail)."""

    head: Item
    relation: Item
    tail: Item
    score: float
    known: Annotated[bool, Field(description="The graph holds this fact already.")]


class ScoreResponse(BaseModel):
    """Scores in the order of the request."""

    model: ModelRef
    scores: list[ScoreBody]


class Counts(BaseModel):
    """Sizes of the graph the model answers about."""

    entities: int
    relations: int
    known_facts: int


class Limits(BaseModel):
    """What a request may ask for."""

    max_top_k: int
    max_triples: int
    max_body_bytes: int
    request_timeout_s: float


class ModelInfo(BaseModel):
    """What is being served."""

    model: ModelRef
    graph_version: str
    new_entities: Annotated[bool, Field(description="Whether predict takes entities that the graph does not have.")]
    counts: Counts
    metrics: Annotated[dict[str, Any], Field(description="As measured when the model was made.")]
    limits: Limits


class Status(BaseModel):
    """The answer of the health endpoints."""

    status: Literal["ok"]


class ProblemError(BaseModel):
    """One thing wrong with the request."""

    pointer: Annotated[str, Field(description="JSON pointer into the request body.")]
    detail: str
    near: Annotated[list[str], Field(description="External ids that may have been meant.")] = []


class ProblemBody(BaseModel):
    """RFC 9457 problem details, media type application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[ProblemError] = []
