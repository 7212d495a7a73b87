"""A full disk, really full: a tmpfs of 2 MiB in a mount namespace, and /dev/full where nobody may mount."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import can_mount

from kgray.artifact import Draft, Recipe, Store
from kgray.errors import StorageError

WRITERS = {
    "bytes": 'draft.write_bytes("big.bin", os.urandom(8 << 20))',
    "table": 'draft.write_table("big.parquet", table)',
    "stream": """with draft.open_parquet("big.parquet", table.schema) as writer:
        writer.write_table(table)""",
    "local": '(draft.local_dir() / "big.bin").write_bytes(os.urandom(8 << 20))',
    "wrapped": """try:
        draft.write_bytes("big.bin", os.urandom(8 << 20))
    except Exception as error:
        raise RuntimeError("a worker failed") from error""",
}

SCRIPT = """
import os, sys
import pyarrow as pa
from kgray.artifact import Recipe, Store
from kgray.errors import StorageError

table = pa.table({"x": pa.array([os.urandom(1 << 20) for _ in range(8)])})

def make(draft):
    WRITE

store = Store(sys.argv[1])
small = store.build(Recipe("model", 1), lambda draft: draft.write_bytes("a.bin", bytes(1000))).artifact
try:
    store.build(Recipe("graph", 1), make)
except StorageError as error:
    print(error)
left = [os.path.join(d, f) for d, _, files in os.walk(sys.argv[1]) for f in files]
print(sorted(os.path.basename(f) for f in left))
small.verify(hashes=True)
assert store.find(Recipe("graph", 1)) is None
store.build(Recipe("graph", 1), lambda draft: draft.write_bytes("a.bin", bytes(1000)))
"""

# Where no one may mount (a container without the right to), /dev/full below is the whole test.
NAMESPACE = can_mount()


@pytest.mark.parametrize("writer", list(WRITERS) if NAMESPACE else [])
def test_full_tmpfs_is_one_line_and_leaves_nothing(tmp_path: Path, writer: str):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("WRITE", WRITERS[writer]))
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" "$3" "$1"'
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", shell, "sh", str(disk), sys.executable, str(script)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    message, left = done.stdout.splitlines()
    assert message.startswith(f"cannot write to {disk}")
    assert "no space left on device" in message
    assert "of 2.0 MiB free there" in message
    assert left == "['a.bin', 'manifest.json']"


@pytest.mark.parametrize("relpath", ["big.bin", "manifest.json"])
def test_device_without_space(tmp_path: Path, relpath: str):
    """/dev/full refuses every write with ENOSPC: in the data, or only when the manifest comes."""
    store = Store(tmp_path)

    def make(draft: Draft) -> None:
        Path(draft.uri, relpath).symlink_to("/dev/full")
        draft.write_bytes("big.bin", bytes(1 << 20))

    with pytest.raises(StorageError, match="no space left on device") as caught:
        store.build(Recipe("graph", 1), make)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*.bin")) == []
    assert store.find(Recipe("graph", 1)) is None


def test_read_only_storage_is_one_line(tmp_path: Path):
    """/sys refuses even root to make a folder."""
    with pytest.raises(StorageError) as caught:
        Store("/sys/kgray").build(Recipe("graph", 1), lambda draft: None)
    assert str(caught.value).startswith("cannot write to /sys/kgray: ")
    assert "\n" not in str(caught.value)
