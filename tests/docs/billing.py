"""The service that the pages call ``billing``: it keeps what it did, and so it is where effects are counted."""

from __future__ import annotations

import threading


class Billing:
    """Creates an invoice for every call, as a service without idempotency keys does.

    It notes the key it is given, so that it can be asked for it afterwards.
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, dict[str, object]]] = []
        self._lock = threading.Lock()

    @property
    def invoices(self) -> int:
        """How many there are."""
        return len(self._made)

    def create(
        self, customer_id: str, invoice_id: str, cents: int, note: str = "", idempotency_key: str = ""
    ) -> dict[str, object]:
        with self._lock:
            invoice = {
                "number": len(self._made) + 1,
                "customer": customer_id,
                "id": invoice_id,
                "cents": cents,
            }
            self._made.append((idempotency_key, invoice))
        return invoice

    def find(self, idempotency_key: str) -> dict[str, object] | None:
        """The invoice made with this key; None when there is none."""
        return next((invoice for key, invoice in self._made if key == idempotency_key), None)
