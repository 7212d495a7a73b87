"""The user's mistake is found inside what Ray raises.

python3 -m pytest tests/unit/test_pipeline_failures.py
"""

from __future__ import annotations

import pickle
import traceback

import pytest
from ray.exceptions import RayTaskError
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from kgray.errors import ArtifactError, ConfigError, DataError, TrainingError
from kgray.pipeline.failures import user_error

MISTAKE = "train.tsv:7: 2 columns instead of 3"


def wrapped(cause: Exception) -> RayTaskError:
    """As ``ray.get`` raises it: pickled on the way, and of both types where the cause's class allows it."""
    try:
        raise cause
    except type(cause):
        text = traceback.format_exc()
    error = RayTaskError("read", text, cause, proctitle="ray::read", pid=1, ip="127.0.0.1")
    return pickle.loads(pickle.dumps(error)).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        DataError(MISTAKE),
        wrapped(DataError(MISTAKE)),
        WorkerGroupError("ranks failed", {0: ValueError("x"), 1: TrainingError(MISTAKE)}),
        WorkerGroupError("ranks failed", {0: wrapped(TrainingError(MISTAKE))}),
        ControllerError(wrapped(DataError(MISTAKE))),
        ExceptionGroup("several", [ValueError("x"), DataError(MISTAKE)]),
        pickle.loads(pickle.dumps(WorkerGroupError("ranks failed", {0: TrainingError(MISTAKE)}))),
    ],
    ids=lambda e: type(e).__name__,
)
def test_it_is_found_under_every_wrapping(error):
    assert user_error(error) == MISTAKE


def test_a_cause_given_by_from_is_found():
    try:
        try:
            raise DataError(MISTAKE)
        except DataError as cause:
            raise RuntimeError("the pipeline failed") from cause
    except RuntimeError as error:
        assert user_error(error) == MISTAKE


def test_a_mistake_that_came_as_text_only_is_read_out_of_the_traceback():
    text = f"Traceback (most recent call last):\n  File x\nkgray.errors.DataError: {MISTAKE}\n\nDuring ..."
    assert user_error(TrainingFailedError(text)) == MISTAKE


def test_a_configuration_error_keeps_its_key_across_processes():
    assert user_error(wrapped(ConfigError("batch_size", -1, "a number above 0").under("train"))) == (
        "configuration key 'train.batch_size' has the value -1; expected a number above 0"
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        wrapped(ValueError("ours")),
        ArtifactError("damaged"),
        wrapped(ArtifactError("damaged")),
        WorkerGroupError("kgray.errors.ArtifactError: damaged", {0: ArtifactError("damaged")}),
        RuntimeError("text that mentions kgray.errors.DataError: but is not of Ray"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_is_ours_stays_ours(error):
    assert user_error(error) is None


def test_a_failure_while_handling_a_mistake_is_ours():
    try:
        try:
            raise DataError(MISTAKE)
        except DataError:
            raise KeyError("a bug") from None
    except KeyError as error:
        assert user_error(error) is None
