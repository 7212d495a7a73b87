"""The ``model`` artifact of the family "rules".

Besides what every family has (kgray/model/bundle.py):

rules.parquet   one row a rule, see :meth:`Rules.to_table`
facts.npy       (n, 3) int64 triples on which the rules are grounded (``Graph.context``: training and, where entities
                are held out, support; their confidence is of training alone), memory-mapped
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kgray.artifact import Artifact, Draft
from kgray.config import from_dict, to_dict
from kgray.errors import ArtifactError
from kgray.graph.graph import Graph
from kgray.model.bundle import write_common
from kgray.reasoning.config import RulesConfig
from kgray.reasoning.recipe import FAMILY
from kgray.reasoning.rules import Rules
from kgray.reasoning.scorer import RuleScorer


def write_rules(draft: Draft, config: RulesConfig, graph: Graph, rules: Rules) -> dict[str, int]:
    """Write the model from rules mined, perhaps in parts, from ``graph``; returns its counts."""
    folder = draft.local_dir()
    write_common(folder, FAMILY, graph, {"rules": to_dict(config)})
    pq.write_table(rules.to_table(), folder / "rules.parquet")
    np.save(folder / "facts.npy", graph.context)
    draft.upload_local()
    draft.drop_local()
    hops = np.bincount(rules.hops[rules.is_path], minlength=4)
    return {
        "entities": graph.num_entities,
        "relations": graph.num_relations,
        "rules": len(rules),
        **{f"rules_{length}_hop": int(hops[length]) for length in (1, 2, 3)},
        "rules_constant": int((~rules.is_path).sum()),
    }


def load_rules(artifact: Artifact, info: Mapping[str, Any]) -> RuleScorer:
    """Open what :func:`write_rules` wrote; ArtifactError where the files contradict each other."""
    folder = artifact.local_path("")
    config = from_dict(RulesConfig, info["rules"], where=str(folder / "config.json"))
    entities, relations = (pq.read_metadata(folder / f"{name}.parquet").num_rows for name in ("entities", "relations"))
    try:
        rules = Rules.from_table(pq.read_table(folder / "rules.parquet"))
        triples = np.load(folder / "facts.npy", mmap_mode="r")
        return RuleScorer.over(rules, triples, entities, relations, config.top)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{artifact.uri}: rules, facts and names do not fit together: {error}") from None
