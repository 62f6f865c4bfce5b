"""A headless browser for the tests of pages; `scripts/setup.sh` installs one where it can."""

import os
import shutil

import pytest

NAMES = ("chromium", "google-chrome", "chromium-browser")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser():
    """Start the Chromium that is installed."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser was found, looked for {', '.join(NAMES)}; install Debian's package chromium")
    from playwright.sync_api import sync_playwright

    # Pages are files here: a proxy has no part in it.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(OPTIONS), env=environment)
        yield browser
        browser.close()
