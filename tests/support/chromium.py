"""The browser of these tests: the system's, or a downloaded one. `python tests/support/chromium.py` installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def path_of_chromium() -> str | None:
    """Return the path of a Chromium, on PATH or Playwright's own; None if neither is installed."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own: str = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def install() -> str | None:
    """Install Debian's, as root or by a sudo that asks nothing; else that of Playwright. What they say is shown."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") and (not as_root or shutil.which("sudo")):
        apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        # If the package lists cannot be updated, the old ones may work.
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run([*apt, *command], stdout=subprocess.DEVNULL, check=False)
    if path_of_chromium() is None:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)
    return path_of_chromium()


if __name__ == "__main__":
    browser = path_of_chromium() or install()
    if browser is None:
        sys.exit("No Chromium can be had here: install one (apt-get install chromium) and try again.")
    print(subprocess.run([browser, "--version"], capture_output=True, text=True, check=True).stdout.strip())
