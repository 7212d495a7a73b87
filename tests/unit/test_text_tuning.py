"""The text encoder in training: what learns, what is stored, which negatives count, what is written.

python3 -m pytest tests/unit/test_text_tuning.py
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from tiny_encoders import save_encoder, tiny_bert

from kgray.errors import ConfigError, StorageError, TrainingError
from kgray.graph.graph import Graph
from kgray.model.contrastive import contrastive_loss
from kgray.model.text_encoder import TunedEncoder
from kgray.text.config import TextConfig
from kgray.text.encoder import TextEncoder
from kgray.text.tokens import Texts, batches, mentions, pack, texts_of
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import OptimiserConfig, TrainConfig
from kgray.training.encoder_task import ContrastiveMaker, EncoderTask
from kgray.training.loop import METRIC, Trainer, fit
from kgray.training.pretrain import pretrain_config
from kgray.training.worker import Worker

N, R = 30, 2
TRAIN = TrainConfig(epochs=2, batch_size=8, precision="float32", optimiser=OptimiserConfig(lr=3e-3, schedule="linear"))
LAST = TuningConfig(layers=1, valid_triples=None)
TEXT = TextConfig(max_length=20)


def entities() -> list[str]:
    """Texts of 2 to 9 words; entity 3 has none."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in generator.integers(0, 30, generator.integers(2, 10))) for _ in range(N)]
    return [*texts[:3], "", *texts[4:]]


RELATION_TEXTS = ["w30 w31", "w32", "w33 w30 w31", "w33 w32"]


def graph(seed: int = 0) -> Graph:
    facts = np.unique(np.random.default_rng(seed).integers(0, [N, R, N], (90, 3)), axis=0)
    facts = np.random.default_rng(seed).permutation(facts)
    return Graph.from_arrays({"train": facts[10:], "valid": facts[:10]}, N, R)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return save_encoder(tmp_path_factory.mktemp("encoder"), tiny_bert())


@pytest.fixture(scope="module")
def texts(folder: str) -> Texts:
    return texts_of(entities(), RELATION_TEXTS, TEXT, folder, [text.split(" ")[0] for text in entities()])


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


def changed(before: dict[str, torch.Tensor], model: TunedEncoder) -> set[str]:
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


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


def learnable(folder: str, options: TuningConfig) -> tuple[Graph, Texts]:
    """Entity 2i points at 2i + 1, which has the same words in another order, and a fifth of it is held out."""
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(40):
        words = generator.integers(0, 30, 4)
        rows += [" ".join(f"w{w}" for w in words), " ".join(f"w{w}" for w in [*words[::-1], 39])]
    pairs = generator.permutation([[2 * i, 0, 2 * i + 1] for i in range(40)])
    data = Graph.from_arrays({"train": pairs[8:], "valid": pairs[:8]}, 80, 1)
    return data, texts_of(rows, ["w30", "w33 w30"], replace(TEXT, tuning=options), folder)


@pytest.mark.parametrize("mode", ["last_layers", "lora", "full"])
def test_it_learns_what_the_texts_say(folder: str, mode: Any) -> None:
    options = replace(LAST, mode=mode, layers=2, rank=4)
    data, texts = learnable(folder, options)
    optimiser = OptimiserConfig(lr=5e-3, schedule="linear")
    done = fit(data, texts, options, replace(TRAIN, epochs=12, patience=12, optimiser=optimiser))
    assert done.history[-1]["train.loss"] < 0.6 * done.history[1]["train.loss"]
    assert done.best > done.history[0][METRIC] + 0.1, "the first row is the encoder as it was"


def test_the_untuned_encoder_is_kept_where_training_only_harms(folder: str) -> None:
    data, texts = learnable(folder, LAST)
    ruin = replace(TRAIN, optimiser=OptimiserConfig(lr=10.0, schedule="constant", warmup=0.0))
    before = TunedEncoder(texts, LAST).state_dict()
    done = fit(data, texts, LAST, ruin)
    assert done.best_epoch == 0 and done.best == done.history[0][METRIC]
    assert not changed(before, done.model)  # type: ignore[arg-type]


def test_an_epoch_may_be_a_sample(texts: Texts) -> None:
    data = graph()
    maker = ContrastiveMaker(data, texts, replace(LAST, epoch_triples=20), TRAIN)
    epochs = [np.concatenate([maker._positions(e, s) for s in range(maker.steps)]) for e in range(2)]
    assert maker.steps == 3 and [len(set(e.tolist())) for e in epochs] == [20, 20]
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("mode", ["last_layers", "lora", "full"])
def test_what_is_written_is_an_ordinary_encoder_that_gives_the_trained_vectors(
    folder: str, texts: Texts, tmp_path: Path, mode: Any
) -> None:
    trainer = Trainer(graph(), texts, replace(LAST, mode=mode, rank=2), TRAIN, Worker("cpu"))
    trainer._epoch()
    rows = np.array([0, 1, 2, 4])
    trained = trainer.model.encode(rows)  # type: ignore[operator]
    trainer.task.write(tmp_path, trainer.task.scorer(), graph(), (), {})
    written = [entities()[row] for row in rows]
    encoder = TextEncoder(str(tmp_path), precision="float32", max_length=20)
    np.testing.assert_allclose(encoder.encode(written).vectors, trained.numpy(), atol=3e-6)
    base = TextEncoder(folder, precision="float32", max_length=20)
    assert np.abs(base.encode(written).vectors - trained.numpy()).max() > 1e-3
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").exists()


class StopError(Exception):
    """Stands for a death of the process."""


class Keeping(Worker):
    """Keeps its last checkpoint in a folder; dies after ``last`` of them."""

    def __init__(self, folder: Path, last: int = 10**9) -> None:
        super().__init__("cpu")
        self.folder, self.left = folder, last

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        shutil.copytree(checkpoint, self.folder, dirs_exist_ok=True)
        self.left -= 1
        if not self.left:
            raise StopError


@pytest.mark.parametrize("died_after", [1, 5])
def test_a_resumed_run_ends_with_the_same_bits(texts: Texts, tmp_path: Path, died_after: int) -> None:
    """Checkpoint 1 lies in the middle of an epoch, 5 at its end."""
    options, train = replace(LAST, dropout=0.1, word_dropout=0.2), replace(TRAIN, checkpoint_steps=2)
    undisturbed = fit(graph(), texts, options, train, Keeping(tmp_path / "a"))
    with pytest.raises(StopError):
        fit(graph(), texts, options, train, Keeping(tmp_path / "b", died_after))
    resumed = fit(graph(), texts, options, train, Keeping(tmp_path / "c"), resume=tmp_path / "b")
    assert resumed.history == undisturbed.history
    assert not changed(undisturbed.model.state_dict(), resumed.model)  # type: ignore[arg-type]


def _two_workers(rank: int, port: int, out: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(run(*arguments), Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def _one_step(texts: Texts, batch_size: int) -> dict[str, Any]:
    worker = Worker("cpu")
    task = EncoderTask.make(graph(), texts, LAST, replace(TRAIN, batch_size=batch_size), worker)
    loss, _ = task.loss(task.batches.make(0, 0))
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = {n: p for n, p in task.model.named_parameters() if p.grad is not None}
    worker.average_gradients(parameters.values())
    mean = float(np.mean(worker.gather(loss.item())))
    return {"loss": mean, "entities": task.scorer().entities, **{n: p.grad for n, p in parameters.items()}}


def test_two_workers_do_what_one_with_the_joint_batch_does(texts: Texts, tmp_path: Path) -> None:
    """The loss and every gradient: negatives are those of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_two_workers, args=(port, str(tmp_path), _one_step, (texts, 8)), nprocs=2)  # type: ignore[no-untyped-call]
    together = _one_step(texts, 16)
    for rank in range(2):
        apart = torch.load(tmp_path / f"{rank}.pt")
        assert apart.pop("loss") == pytest.approx(together["loss"], rel=1e-5)
        for name, value in apart.items():
            torch.testing.assert_close(value, together[name], atol=1e-5, rtol=1e-3)


def test_mistakes_are_told(folder: str, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"text\.tuning\.layers.*3.*at most 2"):
        TunedEncoder(texts, replace(LAST, layers=3))
    with pytest.raises(ConfigError, match=r"text\.max_length.*at most 64"):
        TunedEncoder(replace(texts, max_length=65), LAST)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"text\.tuning\.mode.*lora.*pip install"):
        TunedEncoder(texts, replace(LAST, mode="lora"))
    empty = texts_of([""] * N, RELATION_TEXTS, TEXT, folder)
    with pytest.raises(TrainingError, match="text on both sides"):
        fit(graph(), empty, LAST, TRAIN)
    with pytest.raises(ConfigError, match=r"text\.tuning.*no texts"):
        fit(graph(), None, LAST, TRAIN)
    for wrong in ({"layers": 0}, {"lr": 0.0}, {"word_dropout": 1.0}, {"margin": -1.0}, {"epoch_triples": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(LAST, **wrong)


def test_what_other_models_are_trained_with_is_not_the_encoders() -> None:
    """FGM moves vectors of entities: a train section with it must not stop the encoder, which has none."""
    assert pretrain_config(LAST, replace(TRAIN, adversarial=0.5)).adversarial == 0.0
    assert pretrain_config(LAST, replace(TRAIN, adversarial=0.5)) == pretrain_config(LAST, TRAIN)


def test_the_step_is_there_only_where_it_is_asked_for(tmp_path: Path) -> None:
    from kgray.config import load_config
    from kgray.pipeline.plan import needed
    from kgray.pipeline.settings import Settings
    from kgray.pipeline.steps import steps_of, targets_of

    config = tmp_path / "c.yaml"
    config.write_text("storage: {root: s}\ndata: {triples: {train: a.tsv, valid: b.tsv, test: c.tsv}}\n")

    def names(job: str, *overrides: str) -> list[str]:
        settings = load_config(Settings, str(config), overrides)
        return [step.name for step in needed(steps_of(settings), targets_of(job, settings))]

    assert names("embed") == ["ingest", "embed"]
    assert names("embed", "text.tuning.mode=lora") == ["ingest", "pretrain", "embed"]
    assert names("pretrain", "text.tuning.mode=full") == ["ingest", "pretrain"]
    with pytest.raises(ConfigError, match=r"'text\.tuning' has the value null; expected a section"):
        names("pretrain")
    with pytest.raises(ConfigError, match="'text' has the value null"):
        names("pretrain", "text=null")
    with pytest.raises(ConfigError, match=r"text\.tuning\.mode.*last_layers"):
        names("pretrain", "text.tuning.mode=last")
