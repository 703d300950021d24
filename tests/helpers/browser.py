"""A headless Chromium, where there is one: a page's picture, its console, and its wishes of the network."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_QUIET = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
)
_OWN_HOSTS = re.compile(r"https?://([a-z0-9-]+\.)*(google|googleapis|gvt1)\.com/")
"""Whom Chromium itself would like to talk to."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """What a page did.

    Attributes:
        console: what was written to its console, errors included.
        requests: URLs that it asked the network for.
    """

    console: tuple[str, ...]
    requests: frozenset[str]


def visit(page: Path, picture: Path, *, width: int = 1120, height: int = 1600, dark: bool = False) -> Visit:
    """Open a page, and write what it looks like as a PNG."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        command = [CHROMIUM, *_QUIET, f"--user-data-dir={folder}/profile", f"--log-net-log={log}"]
        command += [f"--window-size={width},{height}", f"--screenshot={picture}"]
        command += ["--blink-settings=preferredColorScheme=0"] if dark else []
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*command, page.resolve().as_uri()], capture_output=True, text=True, check=True, timeout=120
        )
        events = json.loads(log.read_text())["events"]
    urls = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    return Visit(
        console=tuple(re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)),
        requests=frozenset(
            url for url in urls if url.startswith(("http:", "https:")) and not _OWN_HOSTS.match(url)
        ),
    )
