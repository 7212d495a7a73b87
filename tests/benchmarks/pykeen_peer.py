"""PyKEEN's side of kge_training.py and ranking.py, in a process and an environment of its own.

    python -m venv /tmp/pykeen && /tmp/pykeen/bin/pip install pykeen==1.11.1

PyKEEN is no dependency of kgray: the benchmarks are given its interpreter, --pykeen-python /tmp/pykeen/bin/python. This
file imports nothing of kgray. It reads one JSON object a line from stdin and answers each with one on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """The other process, seen from the benchmark: :meth:`ask` waits for the answer."""

    def __init__(self, python: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send a question, wait for its answer; exits where the other side died (its traceback is on stderr)."""
        pipes = self._process
        assert pipes.stdin is not None and pipes.stdout is not None
        print(json.dumps(question), file=pipes.stdin, flush=True)
        line = pipes.stdout.readline()
        if not line:
            raise SystemExit(f"the PyKEEN side ended: {Path(__file__).name} says how to install it")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the other process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What work returns, its wall and processor seconds, and the highest memory of the process while it ran, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory so far (Linux)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return result, {**spent, "peak_mib": int(peak.split()[1]) / 1024}


class Side:
    """PyKEEN's ComplEx on one graph; one method a question, whose fields are its arguments."""

    def start(self, path: str, entities: int, relations: int, rank: int) -> dict[str, Any]:
        """Load triples, and vectors where there are some."""
        import torch
        from pykeen.losses import CrossEntropyLoss
        from pykeen.models import ComplEx
        from pykeen.training import SymmetricLCWATrainingLoop
        from pykeen.triples import CoreTriplesFactory

        saved = np.load(path)
        self.triples = {name: torch.from_numpy(saved[name]) for name in ("train", "valid", "test")}
        self.sizes = {"num_entities": entities, "num_relations": relations}
        factory = CoreTriplesFactory(self.triples["train"], **self.sizes)
        loss = CrossEntropyLoss()
        self.model = ComplEx(
            triples_factory=factory, embedding_dim=rank, loss=loss, regularizer=None, random_seed=0
        )
        if "entity_vectors" in saved:
            tables = (self.model.entity_representations[0], self.model.relation_representations[0])
            for table, name in zip(tables, ("entity_vectors", "relation_vectors"), strict=True):
                weight = table._embeddings.weight
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(saved[name]).reshape(weight.shape))
        optimiser = torch.optim.Adagrad(self.model.parameters(), lr=0.1)
        self.loop = SymmetricLCWATrainingLoop(model=self.model, triples_factory=factory, optimizer=optimiser)
        self.passes = 0
        return {}

    def train(self, start: int, stop: int, batch: int) -> dict[str, Any]:
        """One pass over a stretch of the training triples."""
        from pykeen.triples import CoreTriplesFactory

        part = CoreTriplesFactory(self.triples["train"][start:stop], **self.sizes)
        self.passes += 1  # its loop counts epochs through: the same number again would train nothing
        losses, spent = timed(
            lambda: self.loop.train(
                part, self.passes, batch, continue_training=True, use_tqdm=False, drop_last=False, pin_memory=False
            )
        )
        if len(losses) != self.passes:
            raise RuntimeError(f"PyKEEN trained {len(losses)} of {self.passes} passes")
        return {**spent, "loss": losses[-1]}

    def rank(self, start: int, stop: int, batch: int | None) -> dict[str, Any]:
        """The filtered ranking of a stretch of the test triples."""
        from pykeen.evaluation import RankBasedEvaluator

        evaluator = RankBasedEvaluator(filtered=True, metrics=["mean_reciprocal_rank"], add_defaults=False)
        found, spent = timed(
            lambda: evaluator.evaluate(
                self.model,
                self.triples["test"][start:stop],
                batch_size=batch,
                use_tqdm=False,
                additional_filter_triples=list(self.triples.values()),
            )
        )
        return {**spent, "mrr": found.get_metric("both.realistic.mean_reciprocal_rank")}


def serve(threads: int) -> None:
    """Answer until stdin ends."""
    import torch

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    side = Side()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(side, asked.pop("do"))(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
