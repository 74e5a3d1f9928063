"""Owner tokens: minted per execution, never per process.

12 bytes: 4 that all children of one worker share, 3 of process id, 5 random. Only
the process that holds the token may settle. The first 7 tell a worker's main process which
records a dead child of its own was holding.
"""

from __future__ import annotations

import os

_NEST = os.urandom(4)
"""Made once in a worker's main process and inherited by its forked children. It only
groups owners; what makes one unique is the random part."""

_PID_BYTES = 3  # Linux process ids stay below 2**22

_mine = [b""]
"""The prefix of this process; a list, so that a forked child can put its own in."""


def _new_prefix() -> None:
    _mine[0] = prefix(os.getpid())


def prefix(pid: int | None) -> bytes:
    """What owners minted in a process of this worker begin with.

    Args:
        pid: the process; None where it is not known: any process of this worker.
    """
    return _NEST if pid is None else _NEST + (pid & 0xFFFFFF).to_bytes(_PID_BYTES, "big")


def mint() -> bytes:
    """A new owner. 40 random bits tell apart executions of one intent in one process:
    there are a handful of them, so a collision is a matter of 1e-12 at most."""
    return _mine[0] + os.urandom(5)


def known_dead(owner: bytes) -> bool:
    """True when the process that minted it was of this worker, and is no more.

    A process of another worker, or one that cannot be asked about, is not known to be dead.
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
