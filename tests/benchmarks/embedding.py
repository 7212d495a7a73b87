"""Texts a second of kgray's TextEncoder beside sentence-transformers in float32, on WN18RR's entity texts.

    python tests/benchmarks/embedding.py [--texts 4000] [--threads 2] [--chunk 1000] [--precision auto]

Both read the same texts, in this one process, with the same threads and the same longest text. They take
turns, chunk by chunk, and take turns in going first, so that whatever else the machine does falls on both.
Prints a table, then one line of JSON. Needs the minilm and benchmark extras, and WN18RR under $KGRAY_DATA or
../shared/data.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

TARGET_RATIO, TARGET_COSINE = 2.0, 0.999


@dataclass
class Clock:
    """Wall and processor seconds of one side, over all its chunks."""

    wall: float = 0.0
    cpu: float = 0.0

    def run(self, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result


def wn18rr_texts(count: int) -> list[str]:
    """The first texts of WN18RR's entities, as the embed job makes them."""
    from kgray.text.config import TextConfig
    from kgray.text.template import entity_texts

    folder = Path(os.environ.get("KGRAY_DATA") or ROOT.parent / "shared" / "data") / "wn18rr"
    path = folder / "entities.tsv.gz"
    if not path.is_file():
        raise SystemExit(f"no {path}: set KGRAY_DATA to the directory that holds wn18rr/")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = list(islice(reader, count))
    columns: dict[str, list[str | None]] = {
        "external_id": [row["id"] for row in rows],
        "name": [row["name"] for row in rows],
        "description": [row["description"] for row in rows],
    }
    return entity_texts(columns, TextConfig().template)


def measure(texts: list[str], threads: int, chunk: int, precision: str) -> dict[str, Any]:
    """Both encoders over all texts; rates by wall time (and by processor time), and cosines between their
    rows."""
    from sentence_transformers import SentenceTransformer

    from kgray.text.config import TextConfig
    from kgray.text.encoder import TextEncoder, find_encoder

    config = TextConfig()
    place = find_encoder(config)
    ours = TextEncoder(place.path, max_length=config.max_length, precision=precision, threads=threads)  # type: ignore[arg-type]
    peer = SentenceTransformer(place.path, device="cpu")
    peer.max_seq_length = config.max_length
    ours.encode(texts[:64])
    peer.encode(texts[:64], show_progress_bar=False)
    clocks = {"kgray": Clock(), "sentence-transformers": Clock()}
    cosines, ratios = [], []
    for turn, start in enumerate(range(0, len(texts), chunk)):
        part = texts[start : start + chunk]
        work: dict[str, Callable[[], Any]] = {
            "kgray": lambda part=part: ours.encode(part).vectors,
            "sentence-transformers": lambda part=part: _peer(peer, part, threads),
        }
        order = list(work) if turn % 2 == 0 else list(work)[::-1]
        before = {name: clock.wall for name, clock in clocks.items()}
        rows = {name: clocks[name].run(work[name]) for name in order}
        spent = {name: clock.wall - before[name] for name, clock in clocks.items()}
        ratios.append(spent["sentence-transformers"] / spent["kgray"])
        norms = [np.linalg.norm(r, axis=1) for r in rows.values()]
        cosines.append((rows["kgray"] * rows["sentence-transformers"]).sum(axis=1) / (norms[0] * norms[1]))
    cosine = np.concatenate(cosines)
    fast, slow = clocks["kgray"], clocks["sentence-transformers"]
    return {
        "texts": len(texts),
        "threads": threads,
        "precision": ours.precision,
        "kgray_texts_per_s": len(texts) / fast.wall,
        "peer_texts_per_s": len(texts) / slow.wall,
        "ratio": slow.wall / fast.wall,
        "ratio_cpu_time": slow.cpu / fast.cpu,
        "ratio_worst_chunk": min(ratios),
        "cosine_min": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "passed": bool(slow.wall / fast.wall >= TARGET_RATIO and cosine.min() >= TARGET_COSINE),
    }


def _peer(model: Any, texts: list[str], threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return model.encode(texts, show_progress_bar=False)


def main() -> int:
    """0 when both targets are met, 1 when not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    options = parser.parse_args()
    result = measure(wn18rr_texts(options.texts), options.threads, options.chunk, options.precision)
    print(f"{'':24}{'texts/s':>10}{'relative':>10}")
    print(f"{'kgray ' + result['precision']:24}{result['kgray_texts_per_s']:10.1f}{result['ratio']:10.2f}")
    print(f"{'sentence-transformers':24}{result['peer_texts_per_s']:10.1f}{1:10.2f}")
    print(f"cosine between them: min {result['cosine_min']:.5f}, mean {result['cosine_mean']:.5f}")
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
