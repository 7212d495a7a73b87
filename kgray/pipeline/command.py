"""The command line of every job: arguments in, exit status and one line of JSON out. Floor 6.

Exit status 0: done or up to date. 2: the user's mistake, told in one line on stderr, without a traceback. 1:
a failure of ours, with the traceback. 130: interrupted. The last line on stdout is always one JSON object;
the last line on stderr of a failed job is its reason, which is what Ray's Jobs API shows of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kgray.pipeline.failures import message, user_error

if TYPE_CHECKING:
    from kgray.pipeline.settings import Settings

log = logging.getLogger("kgray")

Body = Callable[[argparse.Namespace], dict[str, Any]]

JOBS = {
    "ingest": "input files -> graph (and corpus)",
    "pretrain": "texts and triples of the graph -> encoder, where text.tuning is set",
    "embed": "texts of the graph -> vectors",
    "train": "graph and vectors -> model",
    "evaluate": "model and graph -> report",
    "explain": "model and a query -> the reasons of its answers",
    "predict": "model and files of queries -> answers in Parquet",
    "deploy": "model -> HTTP service",
    "pipeline": "all of it, each step where it is not up to date",
}


def main(job: str, arguments: Sequence[str] | None = None) -> int:
    """Run a job of :data:`JOBS` with these arguments (by default the process's own); the exit status."""
    parser = parser_of(job)
    given = parser.parse_args(arguments)
    return guarded(job, given, lambda options: run_job(job, options))


def guarded(job: str, options: argparse.Namespace, body: Body) -> int:
    """Run ``body`` under the rules of this module; what it returns is completed to the line of JSON."""
    begin = time.monotonic()
    result = _failed(job)
    reason, status = "", 0
    try:
        with progress_to_stderr():
            result |= body(options)
    except (KeyboardInterrupt, SystemExit):  # SystemExit: what Ray makes of SIGTERM, as `ray job stop` sends it
        reason, status = "interrupted; the same command goes on from where it stopped", 130
    except Exception as error:
        told = user_error(error)
        if told is None:
            traceback.print_exc()
            reason, status = f"{type(error).__name__}: {message(error)}", 1
        else:
            reason, status = told, 2
    result["seconds"] = round(time.monotonic() - begin, 2)
    result.setdefault("metrics", {})
    if status:
        result |= {"status": "failed", "error": reason[:2000]}
    if not result.pop("_said", False):
        _say(result)
    if status:
        # Ray's Jobs API shows the end of stdout and stderr together: the reason comes after everything else.
        print(f"kgray {job}: {reason[:2000]}", file=sys.stderr, flush=True)
    return status


def run_job(job: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build what the job is asked for. Returns the fields of the line of JSON."""
    from kgray.config import load_config, show_config
    from kgray.pipeline.settings import Settings

    settings = load_config(Settings, options.config, [*options.overrides, *_flags(options)])
    if options.show_config:
        print(show_config(settings), end="", flush=True)
        return {"_said": True}  # nothing was done, and what was printed can be saved as a YAML file
    if getattr(options, "dry_run", False):
        from kgray.pipeline.dry_run import dry_run

        return dry_run(settings, options.config)
    return execute(
        job, settings, Path(options.config).stem, keep_serving=getattr(options, "keep_serving", False)
    )


def execute(job: str, settings: Settings, config_name: str, *, keep_serving: bool = False) -> dict[str, Any]:
    """Run a job of :data:`JOBS`; with ``keep_serving`` returns when the process is asked to end."""
    from kgray.pipeline import deployment, results, steps
    from kgray.pipeline.plan import Work, needed
    from kgray.prediction.output import check_output, write_output
    from kgray.prediction.queries import check_queries

    begin = time.monotonic()
    targets = steps.targets_of(job, settings)
    output = None
    if steps.PREDICT in targets:
        output = settings.predict.output
        check_queries(settings.predict)  # what is wrong there must not be told after hours of training
        if output is not None:
            check_output(output)
    with Work(settings, f"{job} {config_name}") as work:
        for step in needed(steps.steps_of(settings), targets):
            work.run(step)
        if output is not None:
            write_output(work.artifacts[steps.PREDICT], output)
        url = None
        if job in ("deploy", "pipeline"):
            url = deployment.deploy_step(work, keep_serving=keep_serving)
        steps.register_again(work)
        text = results.summary(job, work)
        if text:
            print(text, flush=True)
        result = results.result(job, work) | {"url": url, "output": output}
        if keep_serving:
            # Whoever reads stdout learns now that the service is up; this line stays the last.
            _say({"job": job} | result | {"seconds": round(time.monotonic() - begin, 2)})
            log.info("serving at %s until Ctrl-C", url)
            deployment.wait_for_signal()
            result["_said"] = True
    return result


@contextlib.contextmanager
def progress_to_stderr() -> Iterator[None]:
    """What kgray logs goes to stderr, a line a message; of libraries only warnings are heard."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    before = (log.handlers[:], log.level, log.propagate)
    log.handlers[:], log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers[:], log.propagate = before[0], before[2]
        log.setLevel(before[1])


def parser_of(job: str) -> argparse.ArgumentParser:
    """What every job of :data:`JOBS` takes."""
    parser = Parser(prog=f"python -m jobs.{job}", description=JOBS[job])
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="dotted keys over the file's: train.epochs=3 text=null",
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the whole configuration, described, and do nothing"
    )
    if job == "predict":
        said = "a file or glob of queries, for predict.queries; may be given several times"
        parser.add_argument("--queries", metavar="FILE", action="append", help=said)
        parser.add_argument("--output", metavar="FILE", help="one Parquet file of all answers, for predict.output")
    if job == "train":
        parser.add_argument(
            "--dry-run", action="store_true", help="tell what memory, disk and time training needs, and do not train"
        )
    if job in ("deploy", "pipeline"):
        parser.add_argument(
            "--keep-serving", action="store_true", help="stay in the foreground and answer until Ctrl-C"
        )
    return parser


def _flags(options: argparse.Namespace) -> list[str]:
    """The flags of predict as the overrides they stand for."""
    given = {f"predict.{name}": getattr(options, name, None) for name in ("queries", "output")}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


class Parser(argparse.ArgumentParser):
    """Options may stand between overrides, and a wrong argument still ends in one line of JSON."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        message = message.replace(", key=value", "")  # argparse counts it as missing too; it may be left out
        job = self.prog.rpartition(".")[2]
        _say(_failed(job) | {"seconds": 0.0, "metrics": {}, "error": message})
        self.exit(2, f"kgray {job}: {message}\n")


def _failed(job: str) -> dict[str, Any]:
    return {"job": job, "status": "failed", "artifact": None, "version": None}


def _say(result: dict[str, Any]) -> None:
    order = ("job", "status", "artifact", "version", "seconds", "metrics")
    line = {key: result[key] for key in order if key in result}
    line |= {key: value for key, value in result.items() if key not in order and value is not None}
    print(json.dumps(line, ensure_ascii=False), flush=True)
