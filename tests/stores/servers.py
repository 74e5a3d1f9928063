"""Servers that only the store tests need: a pooler, sentinels, a cluster."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.support.processes import Program
from tests.support.servers import PostgresServer, Server, _listens, _on_path, _unprivileged_user


class PgBouncer(Server):
    """pgbouncer in transaction mode: every transaction may get another of two server connections."""

    name = "pgbouncer"

    def __init__(self, postgres: PostgresServer) -> None:
        self._postgres = postgres
        self._user = _unprivileged_user()
        super().__init__(Path(tempfile.mkdtemp(prefix="celery-idem-pgbouncer-")))

    def _check(self) -> None:
        self._binary()

    def _binary(self) -> Path:
        debian = Path("/usr/sbin/pgbouncer")  # not in everybody's PATH
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
