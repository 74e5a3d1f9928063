"""What a browser sends back of the inbox' forms."""

from __future__ import annotations

import html
import re
from typing import Any


def hidden(page: Any) -> dict[str, str]:
    """The hidden fields of a page: csrf, and where an intent is to be decided its key and fence."""
    fields = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    return {name: html.unescape(value) for name, value in fields}


def form_for(client: Any, key: str, base: str = "") -> dict[str, str]:
    """The hidden fields of an intent's page."""
    return hidden(client.get(f"{base}/intent", params={"key": key}))
