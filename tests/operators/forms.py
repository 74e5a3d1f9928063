"""The hidden fields that a browser sends back with the forms of the inbox."""

from __future__ import annotations

import html
import re
from typing import Any


def hidden(page: Any) -> dict[str, str]:
    """Return the hidden fields of a page: csrf and, on the page of an intent, its key and fence."""
    fields = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    return {name: html.unescape(value) for name, value in fields}


def form_for(client: Any, key: str, base: str = "") -> dict[str, str]:
    """Return the hidden fields of an intent's page."""
    return hidden(client.get(f"{base}/intent", params={"key": key}))
