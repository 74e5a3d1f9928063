"""A headless Chromium, and a server whose pages it shows."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.support.servers import free_port
from tests.support.waiting import wait_for


class BrowserMissingError(Exception):
    """Chromium is not installed. The message says what to install."""


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Yield a browser with a window as large as a laptop's."""
    binary, driver = (
        shutil.which("chromium") or shutil.which("chromium-browser"),
        shutil.which("chromedriver"),
    )
    if binary is None or driver is None:
        raise BrowserMissingError("no chromium or chromedriver in PATH: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    options.add_argument("--window-size=1280,900")
    options.add_argument("--disable-dev-shm-usage")  # containers have little shared memory
    options.add_argument("--disable-gpu")  # emulating a GPU takes a fifth of the CPU
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.set_page_load_timeout(30)
        browser.implicitly_wait(10)  # a click returns before the next page is loaded
        yield browser
    finally:
        browser.quit()


@contextlib.contextmanager
def served(site: Any) -> Iterator[str]:
    """Serve an ASGI application while the block runs. Yields its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(site, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, message="the server")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
