"""Edges a second of neighbourhood sampling on one core, beside compiled samplers.

    cc -O3 -march=native -shared -fPIC tests/benchmarks/compiled_sampler.c -o /tmp/compiled_sampler.so
    python tests/benchmarks/sampling.py --compiled /tmp/compiled_sampler.so [--torch-sparse LIBRARY]

Fan-out [15, 10] around --seeds entities a step, drawn from a graph whose degrees follow a power law. Ours leaves the
step's target triples out, keeps relations and gives nested blocks; the compiled ones do neither and draw only for
entities they have not drawn for yet. So edges a second are compared, each side's own. ``compiled_sampler.c`` is the
loop of torch-sparse and pyg-lib without what slows them; pyg-lib itself is not to be had from PyPI. torch-sparse is
compared too where a library with its ``neighbor_sample`` is given, made of two of its sources:

    pip download torch-sparse==0.6.18 --no-deps --no-binary :all: --no-build-isolation
    tar xzf torch_sparse-0.6.18.tar.gz; cd torch_sparse-0.6.18/csrc
    T=$(python -c "import torch; print(torch.__path__[0])")
    g++ -O2 -std=c++20 -shared -fPIC -I. -I../third_party/parallel-hashmap -I$T/include \\
        -I$T/include/torch/csrc/api/include neighbor_sample.cpp cpu/neighbor_sample_cpu.cpp \\
        -L$T/lib -ltorch -ltorch_cpu -lc10 -o torch_sparse_sampler.so

All take turns, and CPU time is what counts, as other work may run on the machine. Prints one line of JSON, and exits 1
when ours is slower than the slowest peer given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from kgray.graph.neighbours import NeighbourIndex, narrow  # noqa: E402
from kgray.graph.sampler import NeighbourSampler, step_generator  # noqa: E402

FANOUTS = [15, 10]
RELATIONS = 50
TARGET = 1.0
Draw = Callable[[np.ndarray], int]
"""Edges drawn around some seeds."""


def power_law(entities: int, triples: int) -> np.ndarray:
    """(triples, 3) int64, both ends drawn in proportion to Pareto weights."""
    generator = np.random.default_rng(0)
    weights = np.cumsum(generator.pareto(1.5, entities) + 1)
    ends = [np.searchsorted(weights, generator.random(triples) * weights[-1]) for _ in range(2)]
    return np.stack([ends[0], generator.integers(0, RELATIONS, triples), ends[1]], axis=1)


def stored_widths(index: NeighbourIndex) -> NeighbourIndex:
    """As the resident store maps it."""
    return NeighbourIndex(
        index.offsets,
        index.sources.astype(narrow(index.num_entities)),
        index.relations.astype(narrow(2 * RELATIONS)),
        index.triples.astype(narrow(index.num_triples)),
        index.num_triples,
    )


def kgray(index: NeighbourIndex) -> Draw:
    """Ours."""
    sampler = NeighbourSampler(stored_widths(index), FANOUTS)

    def draw(seeds: np.ndarray) -> int:
        targets = np.arange(len(seeds)) * 7 % index.num_triples
        return sum(len(b.source) for b in sampler.sample(seeds, step_generator(0, 0, len(seeds), 0), targets))

    return draw


def compiled(index: NeighbourIndex, library: str) -> Draw:
    """The floor in C; its arrays are made once, which is kind to it."""
    function = ctypes.CDLL(library).sample
    function.restype = ctypes.c_int64
    fanouts, room, seed = np.array(FANOUTS, dtype=np.int64), 0, 0
    rooms: list[np.ndarray] = []

    def pointer(array: np.ndarray) -> Any:
        return array.ctypes.data_as(ctypes.c_void_p)

    def draw(seeds: np.ndarray) -> int:
        nonlocal room, rooms, seed
        needed = len(seeds) * (1 + FANOUTS[0] * (1 + FANOUTS[1]))
        if needed > room:
            room = needed
            rooms = [np.empty(room, dtype=np.int64) for _ in range(4)]
        seed += 1
        nodes = ctypes.c_int64()
        return int(
            function(
                pointer(index.offsets), pointer(index.sources), pointer(seeds), ctypes.c_int64(len(seeds)),
                pointer(fanouts), ctypes.c_int64(len(fanouts)), ctypes.c_uint64(seed * 0x9E3779B97F4A7C15 % 2**64),
                *(pointer(one) for one in rooms), ctypes.c_int64(room), ctypes.byref(nodes),
            )
        )  # fmt: skip

    return draw


def torch_sparse(index: NeighbourIndex, library: str) -> Draw:
    """torch-sparse's own."""
    import torch

    torch.set_num_threads(1)
    torch.ops.load_library(library)
    offsets, sources = torch.from_numpy(index.offsets), torch.from_numpy(index.sources)

    def draw(seeds: np.ndarray) -> int:
        drawn = torch.ops.torch_sparse.neighbor_sample(offsets, sources, torch.from_numpy(seeds), FANOUTS, False, True)
        return len(drawn[1])

    return draw


def measure(options: argparse.Namespace) -> dict[str, Any]:
    index = NeighbourIndex.build(power_law(options.entities, options.triples), options.entities, RELATIONS)
    sides = {"kgray": kgray(index)}
    if options.compiled:
        sides["compiled"] = compiled(index, options.compiled)
    if options.torch_sparse:
        sides["torch_sparse"] = torch_sparse(index, options.torch_sparse)
    edges, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
    generator = np.random.default_rng(1)
    for step in range(options.steps + 2):
        seeds = np.unique(generator.integers(0, options.entities, options.seeds))
        for name in sorted(sides, reverse=bool(step % 2)):
            began = time.process_time()
            drawn = sides[name](seeds)
            if step >= 2:  # the first ones warm up
                seconds[name] += time.process_time() - began
                edges[name] += drawn
    rate = {name: edges[name] / seconds[name] for name in sides}
    return {
        "processor": platform.processor() or platform.machine(),
        "entities": options.entities,
        "triples": options.triples,
        "seeds": options.seeds,
        "steps": options.steps,
        **{f"{name}_edges_a_step": edges[name] // options.steps for name in sides},
        **{f"{name}_edges_per_cpu_s": round(rate[name]) for name in sides},
        **{f"ratio_to_{name}": round(rate["kgray"] / rate[name], 3) for name in sides if name != "kgray"},
        "target": TARGET,
    }


def main() -> int:
    """0 when the target is met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", help="compiled_sampler.so")
    parser.add_argument("--torch-sparse", help="a library with torch-sparse's neighbor_sample")
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--triples", type=int, default=10_000_000)
    parser.add_argument("--seeds", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if not (options.compiled or options.torch_sparse):
        parser.error("give a sampler to compare with: --compiled or --torch-sparse")
    result = measure(options)
    print(json.dumps(result))
    return 0 if max(value for key, value in result.items() if key.startswith("ratio_to_")) >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
