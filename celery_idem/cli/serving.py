"""The command ``inbox``: serves the in-doubt inbox without a web application."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket

import click

from celery_idem.cli.screen import Screen, cannot_listen, command
from celery_idem.core.errors import needs
from celery_idem.operate.operators import Operator

TOKEN = "IDEM_INBOX_TOKEN"  # noqa: S105  # a variable's name
"""Environment variable with the token. No option, because every user of the machine can see a command line."""


@command("inbox")
@click.option("--port", type=click.IntRange(0, 65_535), default=8765, show_default=True)
@click.option("--address", default="127.0.0.1", show_default=True)
def inbox(screen: Screen, operator: Operator, port: int, address: str) -> None:
    """Serve the inbox, where operators settle what is in doubt in a browser, until Ctrl-C.

    They sign in with the token in the environment variable IDEM_INBOX_TOKEN; without it, one is made and printed. The
    inbox speaks HTTP: if other machines can reach it, put a proxy with HTTPS in front of it.
    """
    from celery_idem.adapters.inbox import inbox as pages

    with needs("This command needs uvicorn", "inbox"):
        import uvicorn
    given = os.environ.get(TOKEN)
    token = given or secrets.token_urlsafe()
    site = pages(operator.app, token=token)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, port), family=family)
    except OSError as error:
        raise cannot_listen(address, port, error) from None
    url = f"http://{f'[{address}]' if ':' in address else address}:{listening.getsockname()[1]}/"
    if screen.as_json:
        screen.json({"url": url, "token": None if given else token})
    else:
        screen.line(f"{url}  (Ctrl-C ends it)")
        screen.line(f"Sign in with the token in {TOKEN}." if given else f"Sign in with this token: {token}")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(site, log_level="warning")).run(sockets=[listening])
