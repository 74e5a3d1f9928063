"""Our errors keep their attributes when they are pickled, copied or stored in a result backend."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
from celery import Celery
from kombu.utils import json as kombu_json

import celery_idem
from celery_idem.core import errors

SAMPLES: list[errors.IdempotencyError] = [
    errors.IdempotencyError("what happened", "shop.pay:1"),
    errors.ConfigurationError("what to change"),
    errors.IntentError("not this", "shop.pay:1", "cents"),
    errors.StoreError("silence", "shop.pay:1"),
    errors.LeaseLost("gone", "shop.pay:1"),
    errors.OutcomeUnknown("who knows", "shop.pay:1", "the worker stopped"),
    errors.ResultUnavailable("too large", "shop.pay:1", "2 MB"),
    errors.Cancelled("never", "shop.pay:1", "cancelled by jo"),
    errors.IntentConflict("conflict", "shop.pay:1"),
    errors.InProgress("wait", "shop.pay:1", 2.5),
    errors.FingerprintMismatch("other cents", "shop.pay:1", ("cents", "currency")),
]
NAMES = [type(sample).__name__ for sample in SAMPLES]


def same(one: BaseException, other: errors.IdempotencyError) -> None:
    assert type(one) is type(other)
    assert str(one) == str(other) == other.message
    assert vars(one) == vars(other)


def test_there_is_a_sample_of_each() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
    assert {c.__name__ for c in classes} == set(NAMES) == set(errors.__all__)


def test_they_are_one_tree_and_all_public() -> None:
    for sample in SAMPLES:
        assert isinstance(sample, errors.IdempotencyError)
        if type(sample) is not errors.IdempotencyError:
            assert getattr(celery_idem, type(sample).__name__) is type(sample)
    assert issubclass(errors.InProgress, errors.IntentConflict)
    assert issubclass(errors.FingerprintMismatch, errors.IntentConflict)


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_pickle_and_copy(sample: errors.IdempotencyError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        same(pickle.loads(pickle.dumps(sample, protocol)), sample)  # noqa: S301
    same(copy.copy(sample), sample)
    same(copy.deepcopy(sample), sample)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_celerys_result_backend(sample: errors.IdempotencyError, serializer: str) -> None:
    backend = Celery(backend="cache+memory://").backend
    form = backend.prepare_exception(sample, serializer)
    if serializer == "json":
        form = kombu_json.loads(kombu_json.dumps(form))
        json.dumps(form)  # plain JSON, without kombu's extra types
    same(backend.exception_to_python(form), sample)


def test_they_can_be_made_without_arguments() -> None:
    """Some frameworks rebuild an exception by calling its class without arguments."""
    for sample in SAMPLES:
        type(sample)()


def test_a_key_is_always_there_to_ask_for() -> None:
    for sample in SAMPLES:
        assert hasattr(sample, "key")
