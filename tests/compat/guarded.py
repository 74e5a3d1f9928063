"""A pytest plugin that makes IdempotentTask the default task class: `-p tests.compat.guarded`."""

from celery.app.base import Celery

from celery_idem import IdempotentTask

Celery.task_cls = IdempotentTask
assert issubclass(Celery("check", set_as_current=False).Task, IdempotentTask)
