"""The service that the pages call ``billing``. It keeps its invoices, so that effects can be counted."""

from __future__ import annotations

import threading


class Billing:
    """A service that creates an invoice for every call, also if the idempotency key is the same.

    It keeps the key of each invoice, so that the invoice can be found by it.
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, dict[str, object]]] = []
        self._lock = threading.Lock()

    @property
    def invoices(self) -> int:
        """The number of invoices."""
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
        """Return the invoice that was made with this key, or None."""
        return next((invoice for key, invoice in self._made if key == idempotency_key), None)
