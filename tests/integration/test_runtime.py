"""The Ray session: started here, joined, nested; what it sets and takes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kgray.artifact import Draft
from kgray.errors import ConfigError, DataError, StorageError
from kgray.machine import local_cores
from kgray.runtime import (
    LEAST_LOGICAL_CPUS,
    RayConfig,
    RaySession,
    cluster_cpus,
    cluster_gpus,
    device_kind,
)

REPO = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPO, env=env | environment,
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


EMBEDDED = """
import os, sys
from pathlib import Path
from kgray.runtime import *
before = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
config = RayConfig(object_store_memory=200 << 20, temp_dir=sys.argv[1], num_cpus=None)
for turn in range(2):
    with ray_session(config) as session:
        import ray
        assert session.embedded and session.owner, session
        assert cluster_cpus() >= 4, cluster_cpus()

        @ray.remote
        def worker(*names):
            return [os.environ[name] for name in names] + [os.getcwd()]

        names = "RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_CHDIR_TO_TRIAL_DIR"
        assert ray.get(worker.remote(*names)) == ["0", "0", os.getcwd()]
        with ray_session(config) as inner:
            assert inner.embedded and not inner.owner
            assert inner.address == session.address
        assert ray.is_initialized()
        context = ray.data.DataContext.get_current()
        assert not context.enable_progress_bars
        assert context.read_op_min_num_blocks == max(2, cluster_cpus())
    assert not ray.is_initialized()
    assert ray.data.DataContext.get_current().read_op_min_num_blocks == 200
after = {k: v for k, v in os.environ.items() if k.startswith("RAY_") and k != "RAY_CLIENT_MODE"}
assert after == before, (before, after)
assert not Path.home().joinpath(".ray", "auth_token").exists()
print("fine")
"""


@pytest.mark.slow
def test_embedded_twice_leaves_no_trace(short_tmp: Path, tmp_path: Path):
    """Two clusters one after the other in one process; no token is left in the home directory, which would
    lock the user's next ``ray start --head``."""
    done = python(EMBEDDED, str(short_tmp), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


def test_without_ray_it_says_so():
    done = python("from kgray.runtime import *\ntry: cluster_cpus()\nexcept RuntimeError as e: print(e)")
    assert "belongs inside a ray_session" in done.stdout, done.stderr


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_joining_nobody_fails_soon_and_in_one_line(by: str):
    code = (
        "from kgray.runtime import *\nfrom kgray.errors import ClusterError\nimport sys\n"
        "try:\n    with ray_session(RayConfig(address=sys.argv[1] or None)): pass\n"
        "except ClusterError as e: print(e)"
    )
    start = time.monotonic()
    if by == "argument":
        done = python(code, "127.0.0.1:9")
    else:
        done = python(code, "", RAY_ADDRESS="127.0.0.1:9")
    assert "cannot join the Ray cluster at 127.0.0.1:9" in done.stdout, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert time.monotonic() - start < 60


def test_another_process_joins_by_address(ray_cluster: RaySession):
    """As a job does, which finds RAY_ADDRESS in its environment; leaving does not stop what it joined."""
    code = (
        "from kgray.runtime import *\n"
        "with ray_session(RayConfig(num_cpus=1)) as s: print(s.embedded, s.owner, s.address, cluster_cpus())"
    )
    # The cluster of the tests was started with a token that only its process tree knows.
    token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    done = python(code, RAY_ADDRESS=ray_cluster.address, **token)
    assert done.stdout.splitlines()[-1] == f"False False {ray_cluster.address} 4", done.stderr
    assert cluster_cpus() == 4


@pytest.mark.slow
def test_strangers_are_kept_out(ray_cluster: RaySession):
    """Without the token nobody on the network can run code in an embedded cluster."""
    code = (
        "from kgray.runtime import *\n"
        "with ray_session(RayConfig(address='" + ray_cluster.address + "')) as s: print('in')"
    )
    done = python(code)
    assert "in" not in done.stdout.split()
    assert done.returncode != 0
    assert "it demands a token" in done.stderr.strip().splitlines()[-1]


def test_resources(ray_cluster: RaySession):
    assert ray_cluster.embedded
    assert cluster_cpus() == 4 >= LEAST_LOGICAL_CPUS
    assert device_kind() == ("cuda" if cluster_gpus() else "cpu")
    assert 1 <= local_cores() <= (os.cpu_count() or 1)


@pytest.mark.slow
def test_data_and_a_train_worker_share_two_cores(ray_cluster: RaySession, tmp_path: Path):
    """Ray Data feeding one Train worker must not wait for ever for a CPU (idiom 0.4)."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def loop(config: dict[str, str]) -> None:
        rows = sum(len(batch["id"]) for batch in ray.train.get_dataset_shard("train").iter_batches(batch_size=10))
        ray.train.report({"rows": rows, "cpus": float(cluster_cpus())})

    trainer = TorchTrainer(
        loop,
        datasets={"train": ray.data.range(100).map_batches(lambda b: {"id": b["id"]}, num_cpus=1)},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="t", storage_path=str(tmp_path)),
    )
    assert trainer.fit().metrics is None  # nothing was checkpointed; that it ended is the point


def test_errors_of_workers_arrive_as_themselves(ray_cluster: RaySession, tmp_path: Path):
    """A user's mistake found in a worker is still a UserError; a full disk is still told in one line."""
    import ray

    from kgray.artifact import Recipe, Store

    def refuse(batch: dict[str, object]) -> dict[str, object]:
        raise DataError("triples.tsv:7: two columns instead of three")

    with pytest.raises(DataError) as wrong:
        ray.data.range(3).map_batches(refuse).materialize()

    assert str(wrong.value.cause) == "triples.tsv:7: two columns instead of three"  # type: ignore[attr-defined]

    def write(row: dict[str, int], draft: Draft) -> dict[str, int]:
        Path(draft.uri, "part.bin").symlink_to("/dev/full")
        draft.write_bytes("part.bin", bytes(1 << 20))
        return row

    def make(draft: Draft) -> None:
        ray.data.range(1).map(write, fn_args=[draft]).materialize()

    with pytest.raises(StorageError, match="no space left on device") as caught:
        Store(tmp_path).build(Recipe("graph", 1), make)
    assert "\n" not in str(caught.value)


def test_drafts_are_written_by_workers(ray_cluster: RaySession, tmp_path: Path):
    import pyarrow as pa
    import ray

    from kgray.artifact import Recipe, Store

    @ray.remote
    def part(draft: Draft, n: int) -> int:
        draft.write_table(f"parts/part-{n:05d}.parquet", pa.table({"x": [n]}))
        return n

    def make(draft: Draft) -> dict[str, int]:
        return {"rows": len(ray.get([part.remote(draft, n) for n in range(3)]))}

    artifact = Store(tmp_path).build(Recipe("graph", 1), make).artifact
    assert artifact.read_table("parts")["x"].to_pylist() == [0, 1, 2]
    assert artifact.counts == {"rows": 3}


@pytest.mark.parametrize(
    "wrong",
    [{"num_cpus": 0}, {"object_store_memory": 1000}, {"metrics_port": 10055}, {"dashboard_port": 80},
     {"temp_dir": "/" + "x" * 60}],
)  # fmt: skip
def test_wrong_configuration(wrong: dict[str, object]):
    with pytest.raises(ConfigError) as caught:
        RayConfig(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)) in str(caught.value)


def test_unknown_host_is_one_line():
    """The address of a cluster no machine has."""
    code = (
        "from kgray.runtime import *\nfrom kgray.errors import ClusterError\n"
        "try:\n    with ray_session(RayConfig(address='no-such-host.invalid:6379')): pass\n"
        "except ClusterError as e: print(e)"
    )
    done = python(code)
    assert "cannot join the Ray cluster at no-such-host.invalid:6379" in done.stdout, done.stderr
