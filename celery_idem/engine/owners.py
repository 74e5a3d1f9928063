"""Owner tokens: minted per execution, never per process.

A token has 12 bytes: 4 that all children of one worker share, 3 of the process id, and 5 random ones. Only the process
that has the token may settle. By the first 7, a worker's main process finds what a dead child was holding.
"""

from __future__ import annotations

import os

_NEST = os.urandom(4)
"""Made once in a worker's main process, and inherited by its forked children. It only groups owners. The random bytes
make each of them unique."""

_PID_BYTES = 3  # Linux process ids stay below 2**22

_mine = [b""]
"""The prefix of this process. A list, so that a forked child can replace it."""


def _new_prefix() -> None:
    _mine[0] = prefix(os.getpid())


def prefix(pid: int | None) -> bytes:
    """Return the beginning of the owners that a process of this worker mints.

    Args:
        pid: the process; None: any process of this worker.
    """
    return _NEST if pid is None else _NEST + (pid & 0xFFFFFF).to_bytes(_PID_BYTES, "big")


def mint() -> bytes:
    """Return a new owner.

    40 random bits only have to differ among the executions of one intent in one process. There are a handful of them,
    so the chance of a collision is 1e-12 at most.
    """
    return _mine[0] + os.urandom(5)


def known_dead(owner: bytes) -> bool:
    """Whether the process that minted an owner belonged to this worker, and does not exist any more.

    Of other workers' processes, and of one that the system does not tell about, this is not known.
    """
    if owner[:4] != _NEST:
        return False
    try:
        os.kill(int.from_bytes(owner[4:7], "big"), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


_new_prefix()
os.register_at_fork(after_in_child=_new_prefix)
