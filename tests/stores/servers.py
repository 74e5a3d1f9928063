"""Servers that only the store tests need: a pooler, a standby, sentinels, a cluster."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import redis

from tests.support.processes import Program
from tests.support.servers import (
    PostgresServer,
    RedisServer,
    Server,
    _listens,
    _on_path,
    _unprivileged_user,
    free_port,
)
from tests.support.waiting import wait_for


class PgBouncer(Server):
    """pgbouncer in transaction mode, with two server connections: each transaction may get either."""

    name = "pgbouncer"

    def __init__(self, postgres: PostgresServer) -> None:
        self._postgres = postgres
        self._user = _unprivileged_user()
        super().__init__(Path(tempfile.mkdtemp(prefix="celery-idem-pgbouncer-")))

    def _check(self) -> None:
        self._binary()

    def _binary(self) -> Path:
        debian = Path("/usr/sbin/pgbouncer")  # this folder is not in the PATH of every user
        return debian if debian.exists() else _on_path("pgbouncer", "pgbouncer")

    def _launch(self) -> Program:
        self.folder.chmod(0o755)
        settings = self.folder / "pgbouncer.ini"
        settings.write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={self._postgres.port} user=postgres\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 200\n"
        )
        command = [self._binary(), settings]
        return Program(command, log=self.folder.with_suffix(".log"), cwd=self.folder, user=self._user)

    def _answers(self) -> bool:
        return _listens(self.port)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".log").unlink(missing_ok=True)

    def url_for(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


class Standby(PostgresServer):
    """A hot standby that follows another server until it is promoted."""

    name = "standby"

    def __init__(self, primary: PostgresServer) -> None:
        self._primary = primary
        super().__init__()

    def _make_data(self) -> list[str | Path]:
        source = f"host=127.0.0.1 port={self._primary.port} user=postgres"
        return [self._tool("pg_basebackup"), "-D", self._data, "-d", source, "-R", "-c", "fast"]


class SentinelServer(RedisServer):
    """`redis-server --sentinel`, watching a master under the name "shop"."""

    name = "sentinel"

    def __init__(self, folder: Path, master: RedisServer) -> None:
        self._master = master
        super().__init__(folder)

    def _launch(self) -> Program:
        settings = self.folder / "sentinel.conf"
        if not settings.exists():  # the sentinel itself writes its state into this file
            settings.write_text(
                f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
                f"sentinel monitor shop 127.0.0.1 {self._master.port} 2\n"
                "sentinel down-after-milliseconds shop 1500\nsentinel failover-timeout shop 3000\n"
            )
        command = [self._binary(), settings, "--sentinel"]
        return Program(command, log=self.folder / "sentinel.log", cwd=self.folder)


class Watched:
    """A master, a replica, and three sentinels, of which two must agree on a failover."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Watched:
        with contextlib.ExitStack() as stack:
            # On disk: a master that restarts empty, and becomes the master again, would empty its replica.
            quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
            self.master = stack.enter_context(
                RedisServer(self._folder / "master", appendonly=True, options=quick)
            )
            follow = (*quick, "--replicaof", "127.0.0.1", str(self.master.port))
            self.replica = stack.enter_context(
                RedisServer(self._folder / "replica", appendonly=True, options=follow)
            )
            self.sentinels = [
                stack.enter_context(SentinelServer(self._folder / f"sentinel-{n}", self.master))
                for n in range(3)
            ]
            wait_for(self._ready, 30, "the sentinels to know each other and the replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        hosts = ";".join(f"sentinel://127.0.0.1:{s.port}" for s in self.sentinels)
        return f"{hosts}/0?master_name=shop"

    def master_port(self) -> int:
        """The port of the server that the sentinels consider the master."""
        with client(self.sentinels[0]) as sentinel:
            return int(sentinel.sentinel_get_master_addr_by_name("shop")[1])

    def story(self) -> list[str]:
        """The log lines of the sentinels about changed roles."""
        lines = [line for server in self.sentinels for line in server.program.log_text().splitlines()]
        return sorted(line for line in lines if "+switch-master" in line or "+convert-to-slave" in line)

    def _ready(self) -> bool:
        for server in self.sentinels:
            with client(server) as sentinel:
                state = sentinel.sentinel_masters()["shop"]
                if state["num-slaves"] != 1 or state["num-other-sentinels"] != 2:
                    return False
        with client(self.replica) as replica:
            return bool(replica.info("replication")["master_link_status"] == "up")


class Cluster:
    """Masters that share the slots, with `replicas` replicas each."""

    def __init__(self, folder: Path, size: int = 3, replicas: int = 0) -> None:
        self._folder = folder
        self._size = size
        self._replicas = replicas
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        with contextlib.ExitStack() as stack:
            self.nodes = [
                stack.enter_context(ClusterServer(self._folder / f"node-{n}", options=options))
                for n in range(self._size)
            ]
            hosts = [f"127.0.0.1:{node.port}" for node in self.nodes]
            self._manage("create", *hosts, "--cluster-replicas", str(self._replicas), "--cluster-yes")
            wait_for(self._ready, 30, "every node to know every slot")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return f"redis-cluster://127.0.0.1:{self.nodes[0].port}"

    def _ready(self) -> bool:
        for node in self.nodes:
            with client(node) as one:
                info = one.execute_command("CLUSTER INFO")
                known = one.execute_command("CLUSTER SLOTS")
                if info["cluster_state"] != "ok" or len(known) != self._size // (1 + self._replicas):
                    return False
        return True

    def _manage(self, *words: str) -> None:
        """Runs `redis-cli --cluster`."""
        command = ["redis-cli", "--cluster", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr

    def give_away(self, slots: range, source: RedisServer, target: RedisServer) -> None:
        """Moves slots without keys at once. `redis-cli --cluster reshard` takes a minute for thousands of slots."""
        with client(source) as giving, client(target) as taking:
            heir = taking.execute_command("CLUSTER MYID").decode()
            for one in (taking, giving):
                with one.pipeline(transaction=False) as pipe:
                    for slot in slots:
                        pipe.execute_command(f"CLUSTER SETSLOT {slot} NODE", heir)
                    pipe.execute()
                if one is taking:
                    one.execute_command("CLUSTER BUMPEPOCH")
        wait_for(lambda: self._agreed(slots.start, target), 30, "every node to know the new owner")

    def _agreed(self, slot: int, owner: RedisServer) -> bool:
        """Whether every node knows the slot's owner, and all nodes the same owners of all slots."""
        maps = set()
        for node in self.nodes:
            with client(node) as one:
                ranges = one.execute_command("CLUSTER SLOTS")
            if not any(r[0] <= slot <= r[1] and r[2][1] == owner.port for r in ranges):
                return False
            maps.add(tuple(sorted((r[0], r[1], r[2][1]) for r in ranges)))
        return len(maps) == 1

    def remove(self, node: RedisServer, heir: RedisServer) -> None:
        """Moves a master's slots to another, and removes it from the cluster. It goes on running, alone."""
        with client(node) as going, client(heir) as staying:
            gone, left = [one.execute_command("CLUSTER MYID").decode() for one in (going, staying)]
        host = f"127.0.0.1:{heir.port}"
        ways = ("--cluster-from", gone, "--cluster-to", left, "--cluster-slots", "16384", "--cluster-yes")
        self._manage("reshard", host, *ways)
        self._manage("del-node", host, gone)

    def move(self, slot: int, source: RedisServer, target: RedisServer, pause: Callable[[], None]) -> None:
        """Moves one slot as `redis-cli --cluster reshard` does. Calls `pause` while it is half moved."""
        with client(source) as giving, client(target) as taking:
            ids = [one.execute_command("CLUSTER MYID") for one in (giving, taking)]
            source_id, target_id = [i.decode() if isinstance(i, bytes) else i for i in ids]
            taking.execute_command(f"CLUSTER SETSLOT {slot} IMPORTING", source_id)
            giving.execute_command(f"CLUSTER SETSLOT {slot} MIGRATING", target_id)
            pause()
            while keys := giving.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
                for key in keys:
                    giving.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
                pause()
            taking.execute_command(f"CLUSTER SETSLOT {slot} NODE", target_id)
            giving.execute_command(f"CLUSTER SETSLOT {slot} NODE", target_id)


class ClusterServer(RedisServer):
    """A node of a cluster, with a second free port for the other nodes: the default one may be in use."""

    name = "node"

    def _launch(self) -> Program:
        self.options = (*self.options[:4], "--cluster-port", str(free_port()))
        return super()._launch()


def client(server: RedisServer) -> redis.Redis:
    return redis.Redis(port=server.port, socket_timeout=5)


def tls(folder: Path, host: str, *more: str) -> tuple[int, Path, tuple[str, ...]]:
    """A port, a new certificate for `host`, and the options with which a Redis serves TLS there."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={host}",
        *more,
    ]
    made = subprocess.run(
        [*words, "-keyout", key, "-out", certificate], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0, made.stderr
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    return port, certificate, (*options, "--tls-auth-clients", "no")
