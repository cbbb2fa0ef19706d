"""A real browser for tests of web pages: headless Chromium or Chrome, if one is installed."""

import shutil

import pytest
from runs import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        patience = 1000 * PATIENCE  # in milliseconds
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=patience)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A fresh page; a test fails if the page logs an error or requests anything from another machine."""
    context = chromium.new_context()
    context.set_default_timeout(1000 * PATIENCE)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: is_local(request.url) or wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []


def is_local(url):
    return url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
