"""Headless Chromium for the tests of the page: Debian's, driven by Playwright's client.

Owns how it is found, started and told what it may do. Knows nothing about the page. Nothing is
downloaded: without the system's `chromium` the tests are skipped, with what to install.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest

CHROMIUM = shutil.which("chromium")


@contextlib.contextmanager
def chromium() -> Iterator[object]:
    """A running Browser. Playwright's loop must not outlive the tests that use it: other tests have
    loops of their own in this thread."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # In a container there is no user namespace for the sandbox and little /dev/shm.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
