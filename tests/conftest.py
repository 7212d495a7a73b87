"""Fixtures all tests share. No network, nothing downloaded, Ray only through ``kgray.runtime``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# A cluster or a tracking server of the machine's owner is none of the tests' business.
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What nodes keep for themselves: not in the home of whoever runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="kgray-cache-")
os.environ.setdefault("KGRAY_CACHE", _cache.name)


@pytest.fixture(scope="session")
def umls() -> Path:
    """UMLS as it lies in the repo: train.tsv, valid.tsv, test.tsv, entities.tsv, relations.tsv."""
    return REPO / "configs" / "data" / "umls"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of larger data sets: KGRAY_DATA, else ../shared/data."""
    root = Path(os.environ.get("KGRAY_DATA") or REPO.parent / "shared" / "data")
    if not root.is_dir():
        pytest.fail(f"no data at {root}: set KGRAY_DATA to a folder with wn18rr/, fb15k-237/, ...")
    return root


@pytest.fixture()
def short_tmp() -> Iterator[Path]:
    """A folder with a short path, for the sockets of Ray."""
    folder = Path(tempfile.mkdtemp(prefix="kg", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """One small Ray for all tests that need one (4 logical CPUs, 200 MB); yields the RaySession."""
    from kgray.runtime import RayConfig, ray_session

    folder = tempfile.mkdtemp(prefix="kg", dir="/tmp")
    config = RayConfig(
        address="local", num_cpus=4, object_store_memory=200 << 20, temp_dir=folder, progress=False
    )
    try:
        with ray_session(config) as session:
            yield session
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 inside this process (moto), with AWS's variables pointing there for the
    session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield endpoint
    server.stop()


@pytest.fixture()
def s3_root(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A URI in a bucket of its own."""
    import boto3

    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())
    bucket = f"kgray-{name[:40]}".strip("-")
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/artifacts"


def can_mount() -> list[str]:
    """The command that gives a process a mount namespace of its own here; empty where nobody may."""
    if not shutil.which("unshare"):
        return []
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        probe = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return command
    return []
