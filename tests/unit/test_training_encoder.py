"""The text encoder in the training loop: what it learns, what is written, resuming, two workers, mistakes.

python3 -m pytest tests/unit/test_training_encoder.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

from kept_checkpoints import Keeping, StopError
from tuning_texts import LAST, RELATION_TEXTS, TEXT, TRAIN, N, changed, encoder_in, entities, graph, texts_of_graph

from kgray.errors import ConfigError, TrainingError
from kgray.graph.graph import Graph
from kgray.model.text_encoder import TunedEncoder
from kgray.text.encoder import TextEncoder
from kgray.text.tokens import Texts, texts_of
from kgray.text.tuning_config import TuningConfig
from kgray.training.config import OptimiserConfig
from kgray.training.encoder_task import ContrastiveMaker, EncoderTask
from kgray.training.loop import METRIC, Trainer, fit
from kgray.training.pretrain import pretrain_config
from kgray.training.worker import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return encoder_in(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def texts(folder: str) -> Texts:
    return texts_of_graph(folder)


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


@pytest.mark.parametrize("died_after", [1, 5])
def test_a_resumed_run_ends_with_the_same_bits(texts: Texts, tmp_path: Path, died_after: int) -> None:
    """Checkpoint 1 lies in the middle of an epoch, 5 at its end."""
    options, train = replace(LAST, dropout=0.1, word_dropout=0.2), replace(TRAIN, checkpoint_steps=2)
    undisturbed = fit(graph(), texts, options, train, Keeping(tmp_path / "a"))
    with pytest.raises(StopError):
        fit(graph(), texts, options, train, dying := Keeping(tmp_path / "b", died_after))
    resumed = fit(graph(), texts, options, train, Keeping(tmp_path / "c"), resume=dying.kept[-1])
    assert resumed.history == undisturbed.history
    assert not changed(undisturbed.model.state_dict(), resumed.model)  # type: ignore[arg-type]


def _two_workers(rank: int, out: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
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
    mp.spawn(_two_workers, args=(str(tmp_path), _one_step, (texts, 8)), nprocs=2)  # type: ignore[no-untyped-call]
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
