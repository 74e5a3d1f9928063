# ruff: noqa: E402
"""Tests the inbox in the site of the page, by WSGI and ASGI: only superusers may use it, under their own names."""

import asyncio
import html
import os
import re
from urllib.parse import urlencode

import django

os.environ["DJANGO_SETTINGS_MODULE"] = "shopsite.settings"
django.setup()

from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections
from django.test import AsyncClient, Client
from django.test.utils import override_settings, setup_test_environment
from orders.tasks import capture
from shopsite import celery_app

from celery_idem import Ledger
from tests.operators.intents import in_doubt

setup_test_environment()
override_settings(ROOT_URLCONF="shopsite.urls").enable()
call_command("migrate", verbosity=0)
User.objects.create_superuser("ann", password="x")
User.objects.create_user("clerk", password="x")
ledger = Ledger.from_app(celery_app)
keys = [capture.intent_key(n, 1) for n in (100, 101, 102)]
for key in keys:
    in_doubt(ledger, key)


def form_of(page, **typed):
    found = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page)
    return {**{name: html.unescape(value) for name, value in found}, **typed}


def send(client, form):
    return client.post("/ops/idem/resolve", urlencode(form), "application/x-www-form-urlencoded")


DECISION = {"decision": "happened", "result": '"seen"', "evidence": "in the ledger of the bank"}

# By WSGI, with Django's CSRF check.
client = Client(enforce_csrf_checks=True)
signed_out = client.get("/ops/idem/intent?key=x")
assert signed_out.status_code == 302, signed_out
assert signed_out["location"] == "/accounts/login/?next=/ops/idem/intent%3Fkey%3Dx", signed_out["location"]
assert send(client, DECISION).status_code == 403
client.force_login(User.objects.get(username="clerk"))
assert client.get("/ops/idem/").status_code == 403
client.force_login(User.objects.get(username="ann"))
page = client.get("/ops/idem/")
assert "3 intents wait" in page.content.decode(), page.content
assert "default-src 'none'" in page["content-security-policy"]
assert client.get("/ops/idem/inbox.css")["content-type"].startswith("text/css")
assert client.get("/ops/idem/nothing-here").status_code == 404
page = client.get("/ops/idem/intent", {"key": keys[0]}).content.decode()
assert send(client, {**form_of(page, **DECISION), "csrf": "x"}).status_code == 403
settled = send(client, form_of(page, **DECISION))
assert settled.status_code == 303, settled.content
assert settled["location"].startswith("/ops/idem/?settled="), settled["location"]
assert capture.delay(100, 1).get(timeout=20) == "seen"


async def by_asgi():
    client = AsyncClient()
    await client.aforce_login(await User.objects.aget(username="ann"))
    page = (await client.get("/ops/idem/intent", {"key": keys[1]})).content.decode()
    settled = await send(client, form_of(page, **DECISION))
    assert settled.status_code == 303, settled.content


asyncio.run(by_asgi())

# In a site with ATOMIC_REQUESTS, behind a proxy that changes the host.
connections["default"].settings_dict["ATOMIC_REQUESTS"] = True
with override_settings(USE_X_FORWARDED_HOST=True, ALLOWED_HOSTS=["testserver", "shop.example"]):
    page = client.get("/ops/idem/intent", {"key": keys[2]}).content.decode()
    form = urlencode(form_of(page, **DECISION))
    proxied = {"Origin": "http://shop.example", "X-Forwarded-Host": "shop.example"}
    settled = client.post("/ops/idem/resolve", form, "application/x-www-form-urlencoded", headers=proxied)
    assert settled.status_code == 303, settled.content
for key in keys:
    note = ledger.get(key).record.notes[-1]
    assert (note.by, note.evidence) == ("ann", DECISION["evidence"]), note
