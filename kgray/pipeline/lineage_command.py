"""The command line of ``jobs.lineage``. Floor 6."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kgray.errors import ArtifactNotFoundError, UserError
from kgray.pipeline.command import Parser, guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the chain of an artifact; exit status 2 where ``--verify`` finds a difference."""
    parser = Parser(prog="python -m jobs.lineage", description="from an artifact down to its input files")
    parser.add_argument(
        "target", metavar="URI_OR_VERSION", help="version, kind/version, URI, or models:/NAME@ALIAS"
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file whose storage.root is looked in"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys over the file's")
    parser.add_argument("--storage", metavar="ROOT", help="look in this storage instead")
    parser.add_argument(
        "--verify", action="store_true", help="hash every artifact's and input file's content again"
    )
    return guarded("lineage", parser.parse_args(arguments), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Find, print, check. Raises ArtifactNotFoundError; UserError where ``--verify`` finds a difference."""
    from kgray.lineage.chain import render, trace

    stores, target = _where(options)
    chain = trace(target, stores, verify=options.verify)
    print(render(chain), flush=True)
    nodes = list(chain.walk())
    problems = [f"{node.kind} {node.uri}: {node.problem}" for node in nodes if node.problem]
    if problems and options.verify:
        raise UserError("; ".join(problems))
    return {
        "status": "done",
        "artifact": chain.uri,
        "version": chain.version,
        "metrics": {"artifacts": sum(n.kind != "file" for n in nodes), "files": len(chain.files())},
        "files": [{"uri": node.uri, "sha256": node.version} for node in chain.files()],
        "verified": options.verify or None,
        "problems": problems or None,
    }


def _where(options: argparse.Namespace) -> tuple[list[Any], str]:
    """The stores to look in, and the target with a registry name replaced by the artifact it stands for."""
    from kgray.artifact import Store

    settings = None
    if options.config is not None:
        from kgray.config import load_config
        from kgray.pipeline.settings import Settings

        settings = load_config(Settings, options.config, options.overrides)
    if options.storage:
        roots = [options.storage]
    elif settings is not None:
        roots = [settings.storage.root]
    else:
        home = Path(os.environ.get("KGRAY_STORAGE") or "~/.kgray").expanduser()
        roots = [str(path) for path in sorted(home.glob("*")) if path.is_dir()]
    target = str(options.target)
    if target.startswith("models:/"):
        target = _registered(target, settings, roots)
    return [Store(root) for root in roots], target


def _registered(target: str, settings: Any, roots: list[str]) -> str:
    from kgray.lineage.config import LineageConfig
    from kgray.lineage.registry import find_registered
    from kgray.lineage.tracking import Tracker

    for root in roots:
        uri = find_registered(Tracker(settings.lineage if settings else LineageConfig(), root), target)
        if uri is not None:
            return uri
    raise ArtifactNotFoundError(f"MLflow knows no {target}")
