"""Seconds, CPU seconds and memory of `jobs.ingest` by the number of triples, beside a bare floor, and how time grows.

    python tests/benchmarks/ingest.py                       # 1 and 10 million drawn triples
    python tests/benchmarks/ingest.py --source tsv          # the same triples, written to files first and parsed
    python tests/benchmarks/ingest.py --sizes 1000000 10000000 100000000 --partitions 64
    python tests/benchmarks/ingest.py --write FOLDER --sizes 10000000      # only write them, 8 files

Each size is a fresh `python -m jobs.ingest` with --cpus Ray CPUs. Memory is the proportional set size (PSS) of the job
and all processes under it, Ray's object store among them, looked at every half second; CPU seconds are theirs too. The
floor does in one process, with pyarrow alone, what nobody could leave out: read (or draw) the same rows, encode the
strings of the columns by one dictionary, write the numbers as Parquet. It knows no bounds of memory, no duplicates, no
splits, no partitions, no audit; so it is run up to --floor triples. --checkout DIR measures another version of kgray.
Prints a table on stderr and one JSON object, and exits 1 where a target is missed: 10 million triples a minute, an
exponent of at most 1.05, 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from kgray.data.config import SyntheticConfig  # noqa: E402
from kgray.data.synthetic import SyntheticGraph  # noqa: E402

PER_MINUTE, EXPONENT, MEMORY_GB = 1e7, 1.05, 4.0
FILES = 8
_TICK = os.sysconf("SC_CLK_TCK")


class Watch:
    """CPU seconds and most memory of a process and all below it, from /proc."""

    def __init__(self, pid: int, every: float = 0.5) -> None:
        self.pid, self.every = pid, every
        self.peak = 0
        self.curve: list[tuple[float, int]] = []
        self._cpu: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu(self) -> float:
        return sum(self._cpu.values())

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._stop.wait(self.every):
            total = sum(self._look(pid) for pid in self._tree())
            self.curve.append((time.monotonic() - begun, total))
            self.peak = max(self.peak, total)

    def _tree(self) -> list[int]:
        below: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, ValueError):
                    continue
                below.setdefault(parent, []).append(int(entry.name))
        found, waiting = [], [self.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += below.get(pid, [])
        return found

    def _look(self, pid: int) -> int:
        """Bytes of PSS; 0 of a process that is gone. Its CPU time is noted."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            self._cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICK
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (OSError, IndexError):
            return 0
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        return int(found.group(1)) * 1024 if found else 0


def watched(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command. Its last line on stdout is JSON; what it says on stderr is kept with the seconds it was said."""
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    watch = Watch(process.pid)
    said: list[tuple[float, float, str]] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append((time.monotonic() - begun, watch.cpu, line.rstrip()))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    assert process.stdout is not None
    out = process.stdout.read()
    status = process.wait()
    listener.join()
    watch.stop()
    if status:
        raise SystemExit("\n".join([f"{' '.join(command)} failed:", *(line for _, _, line in said[-20:])]))
    return {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": watch.cpu,
        "peak_gb": watch.peak / 1e9,
        "curve": watch.curve,
        "said": said,
        "answer": json.loads(out.strip().splitlines()[-1]),
    }


def phases(said: list[tuple[float, float, str]]) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of each phase, from the log: the job says when each ends. What lies before the first is
    Ray's start, what lies after the last the hashing and publishing of the artifact."""
    found: dict[str, dict[str, float]] = {}
    before = (0.0, 0.0)
    for at, cpu, line in said:
        told = re.search(r"ingest: (?:phase )?(.+?) (?:begins|done in)", line)
        if told is None:
            continue
        name = "start Ray" if "begins" in line else told.group(1)
        found[name] = {"seconds": round(at - before[0], 2), "cpu_seconds": round(cpu - before[1], 2)}
        before = (at, cpu)
    return found


def write(graph: SyntheticGraph, folder: Path, files: int = FILES) -> list[str]:
    """The graph as TSV files of near-equal size."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [graph.triples * n // files for n in range(files + 1)]
    paths = [str(folder / f"triples-{n:03d}.tsv") for n in range(files)]
    for path, start, end in zip(paths, bounds[:-1], bounds[1:], strict=True):
        graph.write_tsv(path, start, end)
    return paths


def ours(triples: int, paths: list[str] | None, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    said = str(triples) if paths is None else json.dumps(paths)
    command = [
        sys.executable, "-m", "jobs.ingest", str(options.config),
        f"data.triples={said}", f"graph.partitions={options.partitions}", f"storage.root={folder}/storage",
        f"ray.num_cpus={options.cpus}", "lineage.enabled=false", *options.override,
    ]  # fmt: skip
    result = watched(command, {"PYTHONPATH": str(options.checkout), "OMP_NUM_THREADS": "1"})
    result["phases"] = phases(result.pop("said"))
    metrics = result.pop("answer")["metrics"]
    result["metrics"] = metrics.get("ingest", metrics)
    return result


def floor(triples: int, paths: list[str] | None, target: str) -> None:
    """The bare floor, in this process."""
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    begun, spent = time.monotonic(), time.process_time()
    if paths is None:
        parts = [block[:3] for block in SyntheticGraph.sized(triples, SyntheticConfig()).blocks(0, triples)]
        columns = [pa.chunked_array([part[n] for part in parts]) for n in range(3)]
    else:
        names = ["head", "relation", "tail"]
        read = csv.ReadOptions(column_names=names, use_threads=False)
        table = pa.concat_tables(
            csv.read_csv(path, read_options=read, parse_options=csv.ParseOptions(delimiter="\t")) for path in paths
        )
        columns = [table.column(name) for name in names]
    ends = pa.chunked_array(columns[0].chunks + columns[2].chunks).dictionary_encode().unify_dictionaries()
    relation = columns[1].dictionary_encode().unify_dictionaries()
    half = columns[0].num_chunks
    codes = [
        np.concatenate([np.asarray(chunk.indices) for chunk in part])
        for part in (ends.chunks[:half], relation.chunks, ends.chunks[half:])
    ]
    pq.write_table(pa.table(dict(zip(("head", "relation", "tail"), codes, strict=True))), target)
    told = {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - spent}
    print(json.dumps(told))


def measured_floor(triples: int, paths: list[str] | None, folder: Path) -> dict[str, Any]:
    given = [] if paths is None else paths
    command = [sys.executable, __file__, "--run-floor", str(triples), str(folder / "floor.parquet"), *given]
    result = watched(command, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return {"peak_gb": result["peak_gb"], **result["answer"]}


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Slope of a line through log seconds over log sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]) if len(sizes) > 1 else None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for triples in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place)
            graph = SyntheticGraph.sized(triples, SyntheticConfig())
            paths = write(graph, folder / "in") if options.source == "tsv" else None
            bare = measured_floor(triples, paths, folder) if triples <= options.floor else None
            row = {"triples": triples, **ours(triples, paths, options, folder), "floor": bare}
        row["triples_a_minute"] = triples / row["seconds"] * 60
        row["ratio"] = row["seconds"] / bare["seconds"] if bare else None
        row["ratio_cpu"] = row["cpu_seconds"] / bare["cpu_seconds"] if bare else None
        rows.append(row)
        tell(row)
    sizes = [row["triples"] for row in rows]
    return {
        "source": options.source,
        "processor": platform.processor() or platform.machine(),
        "cpus": options.cpus,
        "partitions": options.partitions,
        "override": options.override,
        "rows": rows,
        "exponent_wall": exponent(sizes, [row["seconds"] for row in rows]),
        "exponent_cpu": exponent(sizes, [row["cpu_seconds"] for row in rows]),
        "load": os.getloadavg()[1],
    }


def tell(row: dict[str, Any]) -> None:
    bare = row["floor"]
    beside = ""
    if bare:
        beside = f", floor {bare['seconds']:.1f} s ({bare['cpu_seconds']:.1f} CPU, {bare['peak_gb']:.2f} GB)"
    print(
        f"{row['triples']:>11,} triples: {row['seconds']:.1f} s, {row['cpu_seconds']:.1f} CPU s, "
        f"{row['triples_a_minute'] / 1e6:.2f} million a minute, peak {row['peak_gb']:.2f} GB{beside}",
        file=sys.stderr,
    )
    for name, spent in row["phases"].items():
        print(f"    {name:<28}{spent['seconds']:>8.1f} s {spent['cpu_seconds']:>8.1f} CPU s", file=sys.stderr)


def main() -> int:
    """0 when the targets are met, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--source", choices=["synthetic", "tsv"], default="synthetic")
    parser.add_argument("--partitions", type=int, default=16)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--floor", type=int, default=10_000_000, help="no floor beyond so many triples")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "synthetic.yaml")
    parser.add_argument("--override", nargs="*", default=[], help="more of the configuration: graph.partitioner=...")
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--folder", type=Path, default=None, help="where files and artifacts go, and are removed from")
    parser.add_argument("--curve", type=Path, help="write seconds and bytes of each look at the memory there, as JSON")
    parser.add_argument("--write", type=Path, help="only write the triples of the first size as TSV files there")
    parser.add_argument("--run-floor", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_floor:
        triples, target, *paths = options.run_floor
        floor(int(triples), paths or None, target)
        return 0
    if options.write:
        for path in write(SyntheticGraph.sized(options.sizes[0], SyntheticConfig()), options.write):
            print(path)
        return 0
    result = measure(options)
    curves = {row["triples"]: row.pop("curve") for row in result["rows"]}
    if options.curve:
        options.curve.write_text(json.dumps(curves))
    print(json.dumps(result, default=lambda value: round(float(value), 4)))
    last = result["rows"][-1]
    grown = result["exponent_wall"]
    met = last["triples_a_minute"] >= PER_MINUTE and last["peak_gb"] <= MEMORY_GB
    return 0 if met and (grown is None or grown <= EXPONENT) else 1


if __name__ == "__main__":
    sys.exit(main())
