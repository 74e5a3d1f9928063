"""Redis behind Sentinel and in a cluster: the conformance suite, and roles and slots that move under load."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis.crc import key_slot

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import MICROSECONDS, Stored
from celery_idem.operate import doctor
from celery_idem.stores import open_store
from celery_idem.stores.base import OWNER, Announcement, Change, PartlyError, Reply, Store
from celery_idem.stores.redis_cluster import ClusterStore
from celery_idem.stores.redis_sentinel import SentinelStore
from celery_idem.testing import StoreConformance
from tests.conftest import running
from tests.stores.servers import Cluster, Watched, client
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

pytestmark = pytest.mark.redis

MINE = b"owner-mine--"
DAY = 86_400 * MICROSECONDS


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with running(lambda: Watched(tmp_path_factory.mktemp("watched"))) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(lambda: Cluster(tmp_path_factory.mktemp("cluster"))) as servers:
        yield servers


class TestSentinel(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, watched: Watched) -> None:
        self.url = watched.url

    def make_store(self) -> Store:
        return open_store(self.url)


class TestCluster(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, cluster: Cluster) -> None:
        self.url = cluster.url

    def make_store(self) -> Store:
        return open_store(self.url)


# --- slots that move ---------------------------------------------------------------------------


class Load:
    """Threads that claim the same keys one after the other and settle those they won, until the block ends."""

    def __init__(
        self, url: str, key: Callable[[int], str], threads: int = 3, durability: str = "none"
    ) -> None:
        self.url = url
        self.durability = durability
        self.key = key
        self.winners: dict[str, list[int]] = {}
        self.failures: list[BaseException] = []
        self.errors = 0
        self.done = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)
        if self.failures:
            raise self.failures[0]

    def wait_for(self, more: int) -> None:
        target = self.done + more
        wait_for(lambda: self.done >= target or self.failures, 60, lambda: f"{target} claims, at {self.done}")

    def _run(self, me: int) -> None:
        store = open_store(self.url, self.durability)
        owner = b"owner-%06d" % me
        try:
            for n in itertools.count():
                if self._stop.is_set():
                    return
                key = self.key(n)
                held = self._insist(lambda key=key: store.create(key, owner + b"1"), owner)
                if held is None:
                    continue
                with self._lock:
                    self.winners.setdefault(key, []).append(me)
                    self.done += 1
                self._insist(lambda key=key, held=held: store.replace(key, held, owner + b"2", DAY), owner)
        except BaseException as error:
            self.failures.append(error)
        finally:
            store.close()

    def _insist(self, call: Callable[[], Reply], owner: bytes) -> Stored | None:
        """Repeats the call until the store answers. A record with this owner was written by this thread."""
        while True:
            try:
                reply = call()
            except StoreError:
                self.errors += 1
                self._stop.wait(0.02)
                continue
            stored = reply.stored
            return stored if stored is not None and stored.value.startswith(owner) else None


def test_a_node_of_a_cluster_by_its_own_address_is_asked_once_for_two_keys(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    key = next(k for k in map(str, itertools.count()) if owns(node, key_slot(k.encode())))
    store = open_store(cluster.url.replace("redis-cluster", "redis"))
    with client(node) as one:
        one.config_resetstat()
        standing = store.create(key, MINE.ljust(OWNER)).stored
        for n in range(3):
            assert standing is not None
            change = Change(key, standing, b"%d" % n * OWNER)
            reply, told = store.announce(change, Announcement(f"answer:{key}".encode(), b"paid", 60))
            assert (reply.done, told) == (True, False)
            standing = reply.stored
        assert one.info("commandstats")["cmdstat_evalsha"]["rejected_calls"] == 1


def test_a_slot_moves_under_load_and_every_key_has_one_winner(cluster: Cluster) -> None:
    tag = uuid.uuid4().hex
    slot = key_slot(tag.encode())
    owner = next(n for n in cluster.nodes if owns(n, slot))
    target = next(n for n in cluster.nodes if n is not owner)
    # Every second key lies in the slot that moves.
    with Load(cluster.url, lambda n: f"{{{tag}}}:{n}" if n % 2 else f"{tag}:{n}") as load:
        load.wait_for(50)
        cluster.move(slot, owner, target, lambda: load.wait_for(20))
        load.wait_for(50)
    assert load.errors == 0
    assert all(len(winners) == 1 for winners in load.winners.values())
    store = open_store(cluster.url)
    assert owns(target, slot)
    seen = dict(store.scan(f"{{{tag}}}")) | dict(store.scan(tag))
    assert set(load.winners) <= set(seen)
    assert {seen[key].value[OWNER:] for key in load.winners} == {b"2"}


def test_a_scan_while_slots_move_leaves_nothing_out(cluster: Cluster) -> None:
    """A slot moves from a master that is not read yet to the one that was read first."""
    tag = uuid.uuid4().hex
    store = open_store(cluster.url)
    keys = {f"{tag}:{n}" for n in range(300)}
    assert all(store.create(key, MINE).done for key in keys)
    at = {key: next(n for n in cluster.nodes if owns(n, key_slot(key.encode()))) for key in keys}
    seen: set[str] = set()
    moved = False
    read: list[RedisServer] = []
    for key, _ in store.scan(tag):
        seen.add(key)
        if at[key] not in read:
            read.append(at[key])
        if len(read) == 2 and not moved:
            moved = True
            later = next(node for node in cluster.nodes if node not in read)
            slot = key_slot(next(key for key in keys if at[key] is later).encode())
            cluster.move(slot, later, read[0], lambda: None)
    assert moved
    assert seen == keys


def test_a_scan_while_a_slot_is_half_moved(cluster: Cluster) -> None:
    tag = uuid.uuid4().hex
    slot = key_slot(tag.encode())
    owner = next(n for n in cluster.nodes if owns(n, slot))
    target = next(n for n in cluster.nodes if n is not owner)
    store = open_store(cluster.url)
    keys = {f"{{{tag}}}:{n}" for n in range(15)}  # MIGRATE takes ten at a time
    assert all(store.create(key, MINE).done for key in keys)
    store.indexed(f"{{{tag}}}:")
    opened: set[str] = set()

    def open_some() -> None:
        """Opens intents while the slot moves. Then one script may not write both the record and its index entry."""
        for n in range(3):
            key = f"{{{tag}}}:open {len(opened)} {n}"
            held = store.create(key, MINE, None, 0).stored
            assert held is not None
            if n:
                opened.add(key)
            else:
                assert store.replace(key, held, MINE, DAY).done
        _same({key for key, _, _ in store.open(f"{{{tag}}}:")}, opened)

    open_some()
    cluster.move(
        slot,
        owner,
        target,
        lambda: (
            _same({key for key, _ in store.scan(f"{{{tag}}}:") if "open" not in key}, keys),
            open_some(),
        ),
    )
    open_some()
    _same({key for key, _ in store.scan(f"{{{tag}}}:") if "open" not in key}, keys)


def _same(one: set[str], other: set[str]) -> None:
    assert one == other


def test_a_node_that_is_silent_keeps_no_other_from_renewing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClusterStore(cluster.url)
    olds = {f"silent-{n}": store.create(f"silent-{n}", MINE, DAY).stored for n in range(30)}
    silent = store._owner("silent-0").name
    reach, asked = store._at, []

    def at(node: object, commands: object) -> list[object]:
        asked.append(node.name)  # type: ignore[attr-defined]
        if asked[-1] == silent:
            raise StoreError("no answer")
        return reach(node, commands)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_at", at)
    changes = [Change(key, old, MINE, DAY) for key, old in olds.items() if old is not None]
    for _ in range(2):
        asked.clear()
        with pytest.raises(PartlyError, match="no answer") as error:
            store.replace_many(changes)
        answered = {
            change.key: reply is not None for change, reply in zip(changes, error.value.replies, strict=True)
        }
        assert answered == {key: store._owner(key).name != silent for key in olds}
    assert asked[-1] == silent, "a node known to be silent is asked last"
    assert len(asked) > 1


def test_the_doctor_asks_each_node(cluster: Cluster) -> None:
    app = Celery("cluster", set_as_current=False)
    app.conf.idem_store = cluster.url
    for node in cluster.nodes:
        with client(node) as full:
            full.config_set("maxmemory", int(full.info("memory")["used_memory"] / 0.93))
            found = doctor.examine(doctor.gather(app), (doctor.stores.memory, doctor.stores.writing))
            full.config_set("maxmemory", 0)
        assert [finding.code for finding in found] == ["memory"]
    assert {"persistence"} == {f.code for f in doctor.examine(doctor.gather(app), doctor.ASKING)}


def test_the_urls_first_node_leaves_the_cluster(tmp_path: Path) -> None:
    """The node's slots are moved away and it is removed, under load. Clients go on with the other nodes."""
    with running(lambda: Cluster(tmp_path / "cluster")) as cluster:
        cluster.give_away(range(50, 5461), *cluster.nodes[:2])
        used = open_store(cluster.url)
        assert used.create("before", MINE).done
        with Load(cluster.url, str) as load:
            load.wait_for(50)
            cluster.remove(cluster.nodes[0], cluster.nodes[1])
            load.wait_for(200)
        twice = {key: winners for key, winners in load.winners.items() if len(winners) > 1}
        assert not twice
        assert all(used.create(f"after:{n}", MINE).done for n in range(200))
        assert used.read("before").done
        others = ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)
        anew = open_store(f"redis-cluster://{others}")
        assert all(anew.read(f"after:{n}").done for n in range(200))
        assert len(list(anew.scan("after:"))) >= 200
        cluster.nodes[0].kill()
        assert all(used.read(f"after:{n}").done for n in range(200))


@pytest.mark.slow
def test_a_master_fails_under_load_and_its_replica_takes_over(tmp_path: Path) -> None:
    with running(lambda: Cluster(tmp_path / "cluster", size=6, replicas=1)) as cluster:
        masters = [node for node in cluster.nodes if role(node) == "master"]
        first = open_store(cluster.url, "replicas:1")
        wait_for(
            lambda: all(written(first, str(-n)) for n in range(30)), 30, "the replicas' acknowledgements"
        )
        with Load(cluster.url, str, durability="replicas:1") as load:
            load.wait_for(100)
            masters[0].kill()
            wait_for(
                lambda: sum(role(n) == "master" for n in cluster.nodes if n.alive) == 3, 30, "the failover"
            )
            masters[0].restart()
            load.wait_for(100)
        twice = {key: winners for key, winners in load.winners.items() if len(winners) > 1}
        assert not twice
        seen = dict(open_store(cluster.url).scan(""))
        assert set(load.winners) <= set(seen)


def owns(node: RedisServer, slot: int) -> bool:
    with client(node) as one:
        text = one.execute_command("CLUSTER NODES")
    lines = text.values() if isinstance(text, dict) else ()
    for entry in lines:
        if "myself" in entry["flags"]:
            return any(int(r[0]) <= slot <= int(r[-1]) for r in entry["slots"])
    return False


def test_a_node_that_is_down_is_an_error_for_its_keys_only(tmp_path: Path) -> None:
    with running(lambda: Cluster(tmp_path / "cluster")) as cluster:
        for node in cluster.nodes:
            with client(node) as one:  # lets the cluster go on when a node is down
                one.config_set("cluster-require-full-coverage", "no")
        store = open_store(cluster.url)
        assert all(store.create(str(n), MINE).done for n in range(30))
        cluster.nodes[0].kill()  # the node in the URL
        answered = 0
        for n in range(30):
            with contextlib.suppress(StoreError):
                answered += store.read(str(n)).done
        assert 0 < answered < 30
        cluster.nodes[0].restart()
        wait_for(lambda: answers_all(store), 30, "the node to be back")


def answers_all(store: Store) -> bool:
    with contextlib.suppress(StoreError):
        return len([store.read(str(n)) for n in range(30)]) == 30
    return False


# --- a master that fails --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failover_under_load_loses_nothing_that_was_to_be_durable(tmp_path: Path) -> None:
    with running(lambda: Watched(tmp_path / "watched")) as servers:
        with Load(servers.url, lambda n: f"load:{n}", durability="replicas:1") as load:
            load.wait_for(100)
            servers.master.kill()
            wait_for(lambda: servers.master_port() == servers.replica.port, 30, "the failover")
            servers.master.restart()  # it comes back as a replica of the other
            load.wait_for(100)
        assert load.errors > 0  # the threads noticed the failover
        twice = {key: winners for key, winners in load.winners.items() if len(winners) > 1}
        assert not twice, (len(load.winners), servers.story())
        assert role(servers.master) == "slave"
        seen = dict(open_store(servers.url).scan("load:"))
        assert {key: seen[key].value[:OWNER] for key in load.winners} == {
            key: b"owner-%06d" % winners[0] for key, winners in load.winners.items()
        }


@pytest.mark.parametrize("durability", ["none", "replicas:1"])
def test_a_replica_that_missed_a_claim_is_promoted(
    start_redis: Callable[..., RedisServer], durability: str
) -> None:
    """Asynchronous replication can lose a claim. With `replicas:1` the claim fails instead of being lost."""
    master = start_redis(options=("--repl-diskless-sync-delay", "0"))
    replica = start_redis(options=("--replicaof", "127.0.0.1", str(master.port)))
    wait_for(lambda: acknowledged(master), 30, "the replica's first acknowledgement")
    store = open_store(f"{master.url}?socket_timeout=4", durability)
    assert store.create("before", MINE).done
    assert acknowledged(master)
    with client(replica) as promoted:  # as an operator does when the network is cut
        promoted.execute_command("REPLICAOF", "NO", "ONE")
    if durability == "none":
        assert store.create("a", MINE).done
    else:
        with pytest.raises(StoreError, match="0 of 1 replicas"):  # so the body does not run
            store.create("a", MINE)
    master.kill()
    after = open_store(replica.url)
    assert after.read("before").done
    assert after.create("a", MINE).done  # with durability "none" this is a second winner


@pytest.mark.parametrize("durability", ["none", "replicas:1"])
def test_a_failover_in_the_middle_of_a_claim_to_a_replica_that_lags(tmp_path: Path, durability: str) -> None:
    """With "none", a won claim is lost, and won again. With `replicas:1`, the claim ends with an error instead."""
    with running(lambda: Watched(tmp_path / "watched")) as servers:
        wait_for(lambda: acknowledged(servers.master), 30, "the replica's first acknowledgement")
        store = open_store(f"{servers.url}&socket_timeout=20", durability)
        assert store.create("before", MINE).done
        servers.replica.pause()
        told: list[Reply | StoreError] = []
        try:
            with client(servers.master) as master:  # so the replica gets nothing more when it resumes
                master.execute_command("CLIENT", "KILL", "TYPE", "replica")

            def claim() -> None:
                try:
                    told.append(store.create("a", MINE))
                except StoreError as error:
                    told.append(error)

            claiming = threading.Thread(target=claim)
            claiming.start()
            with client(servers.master) as master:
                wait_for(lambda: master.exists("a"), 10, "the claim to be written")
            if durability == "none":
                claiming.join(10)  # wait for its answer
            servers.master.kill()
        finally:
            servers.replica.resume()
        claiming.join(30)
        assert not claiming.is_alive()
        wait_for(lambda: servers.master_port() == servers.replica.port, 30, "the failover")
        (answer,) = told
        assert isinstance(answer, Reply if durability == "none" else StoreError)
        after = open_store(servers.url)
        assert wait_for(lambda: written(after, "b"), 30)
        assert after.read("before").done
        assert after.create("a", b"owner-yours-").done


def acknowledged(master: RedisServer) -> bool:
    """Whether a replica has acknowledged a write. After its link comes up, a replica gets no commands before
    its first acknowledgement, which it sends up to a second later."""
    with client(master) as one:
        one.incr("beat")
        return bool(one.execute_command("WAIT", 1, 5000) == 1)


def role(server: RedisServer) -> str:
    with client(server) as one:
        return str(one.info("replication")["role"])


@pytest.mark.slow
def test_a_master_that_only_slept_is_left_alone(tmp_path: Path) -> None:
    """When a paused master resumes, it is demoted, and its connections still exist. No client may write to it."""
    with running(lambda: Watched(tmp_path / "watched")) as servers:
        store = open_store(f"{servers.url}&socket_timeout=0.5")
        assert store.create("a", MINE).done
        servers.master.pause()
        try:
            wait_for(lambda: servers.master_port() == servers.replica.port, 30, "the failover")
            with contextlib.suppress(StoreError):  # the paused master does not answer
                store.read("a")
            assert wait_for(lambda: written(store, "b"), 30)
        finally:
            servers.master.resume()
        wait_for(lambda: role(servers.master) == "slave", 30, "the paused master to be demoted")
        assert store.create("c", MINE).done
        with client(servers.replica) as promoted:
            assert promoted.exists("b", "c") == 2


def written(store: Store, key: str) -> bool:
    try:
        return store.create(key, MINE).stored is not None
    except StoreError:
        return False


# --- forms of the URL -------------------------------------------------------------------------------


def test_sentinel_urls() -> None:
    with pytest.raises(ConfigurationError, match="master_name"):
        open_store("sentinel://localhost:26379/0")
    store = open_store(
        "sentinel://me:s3cret@a:1;sentinel://b/2?master_name=shop&sentinel_password=hush&socket_timeout=7"
    )
    assert store.url == "sentinel://a:1;sentinel://b/2"
    assert isinstance(store, SentinelStore)
    given = store._pool.connection_kwargs
    assert (given["username"], given["password"], given["db"], given["socket_timeout"]) == (
        "me",
        "s3cret",
        2,
        7.0,
    )
    manager = store._pool.sentinel_manager
    assert [
        (s.connection_pool.connection_kwargs["host"], s.connection_pool.connection_kwargs["port"])
        for s in manager.sentinels
    ] == [("a", 1), ("b", 26379)]
    assert manager.sentinel_kwargs["password"] == "hush"


def test_cluster_urls() -> None:
    store = open_store("rediss-cluster://me:s3cret@a:1,b/?socket_timeout=7&ssl_cert_reqs=CERT_NONE")
    assert isinstance(store, ClusterStore)
    assert "s3cret" not in store.url
    assert store._seeds == [("a", 1), ("b", 6379)]
    given = store._how
    assert (given["username"], given["password"], given["socket_timeout"]) == ("me", "s3cret", 7.0)
    assert (given["ssl"], given["ssl_cert_reqs"]) == (True, "none")
    for wrong in ("redis-cluster://", "redis-cluster://a:port", "redis-cluster://a:1/3"):
        with pytest.raises(ConfigurationError):
            open_store(wrong)


# --- rights -------------------------------------------------------------------------------------------


def documented_rule() -> str:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "redis.md").read_text()
    (rule,) = re.findall(r"^ACL SETUSER celery_idem (.*)$", page, re.MULTILINE)
    return str(rule).replace("PASSWORD", "s3cret")


def test_a_user_with_the_documented_rights_can_do_everything(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    with client(server) as admin:
        admin.execute_command("ACL", "SETUSER", "celery_idem", *documented_rule().split())
    store = open_store(f"redis://celery_idem:s3cret@127.0.0.1:{server.port}/0")
    use(store)
    with pytest.raises(StoreError, match=r"(?i)no permissions"):
        store.create("other:a", MINE)
    for command in ("FLUSHALL", "KEYS *", "CONFIG GET *"):
        with pytest.raises(StoreError, match=r"(?i)no permissions"):
            store.execute(*command.split())  # type: ignore[attr-defined]


def test_a_user_with_the_documented_rights_can_do_everything_in_a_cluster(cluster: Cluster) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "redis.md").read_text()
    (more,) = re.findall(r"^On a cluster add `(.*?)`", page, re.MULTILINE)
    for node in cluster.nodes:
        with client(node) as admin:
            admin.execute_command("ACL", "SETUSER", "celery_idem", *documented_rule().split(), *more.split())
    use(open_store(cluster.url.replace("//", "//celery_idem:s3cret@")))


def use(store: Store) -> None:
    created = store.create("idem:a", MINE)
    assert created.stored is not None
    assert store.create("idem:a", MINE).stored == created.stored
    assert store.read("idem:a").done
    assert store.peek("idem:a") == created.stored
    replaced = store.replace("idem:a", created.stored, MINE, DAY)
    assert replaced.stored is not None
    (renewed,) = store.replace_many([Change("idem:a", replaced.stored, MINE, DAY)])
    assert renewed.stored is not None
    assert dict(store.scan("idem:")) == {"idem:a": renewed.stored}
    assert store.replace("idem:a", renewed.stored, MINE, 0).done  # forget
