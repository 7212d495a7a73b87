"""The text encoder in training: how texts are packed, what is stored, what learns, which negatives count.

python3 -m pytest tests/unit/test_text_tuning.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_encoders import save_encoder
from tuning_texts import LAST, RELATION_TEXTS, TEXT, TRAIN, N, R, changed, encoder_in, entities, graph, texts_of_graph

from kgray.errors import ConfigError, StorageError
from kgray.graph.graph import Graph
from kgray.model.contrastive import contrastive_loss
from kgray.model.text_encoder import TunedEncoder
from kgray.text.tokens import Texts, batches, mentions, pack, texts_of
from kgray.training.encoder_task import ContrastiveMaker
from kgray.training.loop import Trainer
from kgray.training.worker import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_in(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def texts(folder: str) -> Texts:
    return texts_of_graph(folder)


def plain(folder: str, sequences: list[list[int]], pooling: str = "mean") -> torch.Tensor:
    """The oracle: the whole model of transformers, one sequence at a time."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    rows = []
    for ids in sequences:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]))
        states = output.last_hidden_state[0]
        kinds = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}
        if pooling == "pooler":
            kinds[pooling] = output.pooler_output[0]
        rows.append(torch.nn.functional.normalize(kinds[pooling], dim=0))
    return torch.stack(rows)


def sequence_of(texts: Texts, row: int, continued: int = -1) -> list[int]:
    """The obvious way to one sequence."""
    more = texts.tokens[continued][texts.lead :][: texts.max_length // 2].tolist() if continued >= 0 else []
    return [*texts.tokens[row].tolist()[: texts.max_length - len(more)], *more]


def test_packed_sequences_are_the_obvious_ones(texts: Texts) -> None:
    rows, continued = np.array([5, 0, 7, 5, 3]), np.array([N, -1, N + 3, N + 2, N + 1])
    packed = pack(texts, rows, continued)
    bounds = np.cumsum([0] + [length for n, length in packed.groups for _ in range(n)])
    for at, (row, more) in enumerate(zip(rows.tolist(), continued.tolist(), strict=True)):
        begin, end = bounds[packed.back[at]], bounds[packed.back[at] + 1]
        assert texts.tokens.ids[packed.places[begin:end]].tolist() == (
            sequence_of(texts, row, more) if row != 3 else texts.tokens[more].tolist()
        )
    short = replace(texts, max_length=6)
    assert max(length for _, length in pack(short, rows, continued).groups) <= 6
    parts = batches(texts, rows, continued, 12)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))


def test_words_and_mentions_are_left_out(texts: Texts) -> None:
    rows = np.arange(4, 24)
    whole = pack(texts, rows)
    fewer = pack(texts, rows, drop=0.5, generator=np.random.default_rng(0))
    assert set(fewer.places) < set(whole.places) and 0.3 < len(fewer.places) / len(whole.places) < 0.75
    assert set(texts.tokens.offsets[rows]) <= set(fewer.places), "the first token stays"
    # Every text begins with its own name: [CLS] name ... [SEP].
    own = mentions(texts, rows, rows)
    places = set(pack(texts, rows, without=own).places)
    for row in rows:
        name = texts.names[row]  # type: ignore[index]
        begin = texts.tokens.offsets[row] + 1
        assert not places & set(range(begin, begin + len(name)))
        assert begin - 1 in places
    assert mentions(replace(texts, names=None), rows, rows).size == 0


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
@pytest.mark.parametrize("mode", ["last_layers", "full"])
def test_flat_and_stored_activations_give_what_the_whole_model_gives(
    folder: str, texts: Texts, mode: Any, pooling: Any
) -> None:
    model = TunedEncoder(replace(texts, pooling=pooling), replace(LAST, mode=mode)).eval()
    model.store_lower()
    assert (model._stored is not None) == (mode == "last_layers")
    rows = np.array([9, 0, 1, 2, 4, 4, N])
    expected = plain(folder, [sequence_of(texts, row) for row in rows], pooling)
    torch.testing.assert_close(model.encode(rows), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(model(pack(model.texts, rows)), expected, atol=2e-6, rtol=0)
    assert not model.encode(np.array([3])).any(), "no text, no vector"


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=44, max_position_embeddings=66, initializer_range=0.3, **size)
    place = save_encoder(tmp_path, RobertaModel(config))
    texts = texts_of(entities(), RELATION_TEXTS, TEXT, place)
    model = TunedEncoder(texts, LAST)
    model.store_lower()
    rows = np.array([9, 0, 1, N])
    expected = plain(place, [sequence_of(texts, row) for row in rows])
    torch.testing.assert_close(model.encode(rows), expected, atol=2e-6, rtol=0)


def test_a_full_disk_is_told(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"no room for .* GB.*TMPDIR"):
        TunedEncoder(texts, LAST).store_lower()


def test_a_query_is_read_as_one_text_where_all_layers_learn(folder: str, texts: Texts) -> None:
    model = TunedEncoder(texts, replace(LAST, mode="full"))
    rows, ways = np.array([9, 0, 1]), np.array([N, N + 3, N + 1])
    pairs = zip(rows.tolist(), ways.tolist(), strict=True)
    expected = plain(folder, [sequence_of(texts, row, way) for row, way in pairs])
    torch.testing.assert_close(model.encode(rows, ways), expected, atol=2e-6, rtol=0)


def test_activations_stored_in_bfloat16_are_close(folder: str, texts: Texts) -> None:
    model = TunedEncoder(texts, LAST, torch.bfloat16)
    model.store_lower()
    assert model._stored is not None and model._stored.dtype == torch.bfloat16
    rows = np.array([9, 0, 1, 2, 4, N])
    expected = plain(folder, [sequence_of(texts, row) for row in rows])
    assert float((model.encode(rows) * expected).sum(dim=1).min()) > 0.999


def test_head_and_relation_meet_in_the_layers_that_learn(texts: Texts) -> None:
    """Oracle: both texts through the lower layer alone, then one after the other through the upper one."""
    model = TunedEncoder(texts, LAST)
    model.store_lower()
    bert = model.model.eval()
    lower = []
    for row in (9, N + 2):
        with torch.no_grad():
            states = bert.embeddings(input_ids=torch.from_numpy(texts.tokens[row])[None])
            lower.append(bert.encoder.layer[0](states, None)[0].view(1, -1, 32))
    with torch.no_grad():
        states = bert.encoder.layer[1](torch.cat([lower[0], lower[1][:, 1:]], dim=1), None)
    pooled = states[0].view(-1, 32).mean(0) if states.dim() == 3 else states.mean(0)
    expected = torch.nn.functional.normalize(pooled, dim=0)
    torch.testing.assert_close(model.encode(np.array([9]), np.array([N + 2]))[0], expected, atol=2e-6, rtol=0)


def test_an_encoder_of_another_kind_is_read_a_group_at_a_time(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=44, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    place = save_encoder(tmp_path, DistilBertModel(config))
    texts = texts_of(entities(), RELATION_TEXTS, TEXT, place)
    rows, ways = np.array([9, 0, 1, 1]), np.array([N, N + 3, -1, -1])
    model = TunedEncoder(texts, replace(LAST, mode="full"))
    pairs = zip(rows.tolist(), ways.tolist(), strict=True)
    expected = plain(place, [sequence_of(texts, row, way) for row, way in pairs])
    torch.testing.assert_close(model.encode(rows, ways), expected, atol=2e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"text\.tuning\.mode.*last_layers.*distilbert"):
        TunedEncoder(texts, LAST)


@pytest.mark.parametrize("mode", ["last_layers", "lora", "full"])
def test_only_what_is_chosen_learns(texts: Texts, mode: Any) -> None:
    trainer = Trainer(graph(), texts, replace(LAST, mode=mode, rank=2), TRAIN, Worker("cpu"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._epoch()
    moved = changed(before, trainer.model)  # type: ignore[arg-type]
    assert "log_scale" in moved
    moved.discard("log_scale")
    layers = {"encoder.layer.0", "encoder.layer.1"}
    seen = {layer for layer in layers for name in moved if layer in name}
    if mode == "last_layers":
        assert seen == {"encoder.layer.1"} and all("encoder.layer.1." in name for name in moved)
    elif mode == "lora":
        assert seen == layers and all("lora_" in name for name in moved)
    else:
        assert seen == layers and any("word_embeddings" in name for name in moved)


def test_known_answers_and_duplicates_are_no_negatives(texts: Texts) -> None:
    """The mask against a slow loop over queries and candidates."""
    data = graph()
    maker = ContrastiveMaker(data, texts, LAST, TRAIN)
    facts = {tuple(fact) for fact in data.triples["train"].tolist()}
    for step in range(maker.steps):
        batch = maker.make(0, step)
        triples = maker.triples[maker._positions(0, step)]
        candidates = np.unique(triples[:, [0, 2]]).tolist()
        assert batch.shares == [len(candidates)]
        masked = set(zip(batch.known_query.tolist(), batch.known_candidate.tolist(), strict=True))
        for row, (h, r, t) in enumerate(triples.tolist()):
            for query, answer, fact in (
                (row, t, lambda c, h=h, r=r: (h, r, c)),
                (row + len(triples), h, lambda c, r=r, t=t: (c, r, t)),
            ):
                assert candidates[int(batch.gold[query])] == answer
                for column, candidate in enumerate(candidates):
                    other = candidate != answer and fact(candidate) in facts
                    assert ((query, column) in masked) == other
    assert 3 not in maker.triples[:, [0, 2]], "an entity without text teaches nothing"


def test_the_answers_name_is_left_out_of_the_query_where_asked(texts: Texts) -> None:
    """Each fact's tail is its head: all that a query holds of its own name goes."""
    facts = np.array([[n, 0, n] for n in range(4, 24)])
    data = Graph.from_arrays({"train": facts}, N, R)
    masked, whole = (
        ContrastiveMaker(data, texts, replace(LAST, mask_mentions=on), TRAIN).make(0, 0) for on in (True, False)
    )
    queries = 2 * len(whole.gold) // 2
    assert len(whole.packed.places) - len(masked.packed.places) >= queries


def test_loss_against_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    q, c = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (4, 6))
    gold, rows, columns = torch.tensor([0, 5, 2, 2]), torch.tensor([0, 3]), torch.tensor([1, 4])
    losses = []
    for i in range(4):
        logits = [(float(q[i] @ c[j]) - (0.1 if j == int(gold[i]) else 0.0)) * 7.0 for j in range(6)]
        known = {int(j) for r, j in zip(rows, columns, strict=True) if int(r) == i}
        total = sum(np.exp(v) for j, v in enumerate(logits) if j not in known)
        losses.append(np.log(total) - logits[int(gold[i])])
    loss = contrastive_loss(q, c, gold, (rows, columns), torch.tensor(7.0), 0.1)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
