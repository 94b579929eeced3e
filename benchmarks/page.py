"""What a person waits for: `python -m benchmarks.page [--features 24576] [--rounds 5] [--views FOLDER] [--pictures]`.

    write      seconds, megabytes and files of a page of many features, and the processor time it took
    first      milliseconds from asking for the page on disk until its first view stands, in a browser that is already open
    feature    until the record of a feature that was not fetched before is drawn, and the size of that fetch
    search     from a key to the list that fits it
    heap       megabytes of JavaScript after scrolling through the whole list
    map        until the map stands
    steered    seconds from `saekit serve tiny` to the first piece of steered text

Medians over rounds, with their spread. The catalog of many features is of a random SAE on the embedded model. --views writes a screenshot of every view of
the embedded catalog, dark and light, desktop and phone; --pictures makes those of the README and the docs. Needs chromium and the extras dev and server.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

import saekit
from saekit import embedded

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RESULTS = Path(__file__).parent / "results" / "page.json"
DOCS = Path(__file__).parent.parent / "docs"
PROMPTS = ["Mike pulls out his", "Once upon a time there was a little boat.", "The Jedi looked at the ship"]
VIEWS = {
    "home": "",
    "feature": "#{best}",
    "search": "#q=Jedi",
    "map": "#map",
    "prompts": "#prompts",
    "about": "#about",
}
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
STEER = {
    "prompt": "Mike pulls out his", "max_new_tokens": 8, "seed": 0, "temperature": 1.0, "positions": "all", "control": False,
}  # fmt: skip

out = Console()


def big_catalog(features: int, folder: Path) -> saekit.Catalog:
    """The catalog of a random SAE of many features on the embedded model."""
    model = saekit.load_model("tiny")
    sae = saekit.SAE.new("topk", d_in=256, d_sae=features, k=32, site="blocks.3.hook_resid_pre", model="tiny")
    tokens = saekit.tokenize("tiny", model, context_size=128)
    return saekit.Catalog.build(model, sae, tokens, folder, max_tokens=200_000)


def written(catalog: saekit.Catalog, folder: Path) -> dict[str, float]:
    used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    catalog.page(folder)
    after = resource.getrusage(resource.RUSAGE_SELF)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "seconds": time.perf_counter() - start,
        "processor seconds": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        "MB": sum(path.stat().st_size for path in files) / 1e6,
        "files": len(files),
        "kB a feature": max(p.stat().st_size for p in files if p.name.startswith("shard-")) / 1e3,
    }


@contextmanager
def opened(browser: Browser, address: str, size: str = "desktop", scheme: str = "light") -> Iterator[Page]:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=2 if size == "phone" else 1
    )  # type: ignore[arg-type]  # fmt: skip
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    yield page
    context.close()


def looked_at(browser: Browser, site: Path, features: int) -> dict[str, float]:
    """One round, in a fresh profile."""
    home = (site / "index.html").as_uri()
    start = time.perf_counter()
    with opened(browser, home) as page:
        found = {"first view, ms": 1e3 * (time.perf_counter() - start)}
        start = time.perf_counter()
        page.evaluate(f"location.hash = '#{features * 2 // 3}'")
        page.wait_for_function(f"() => document.title.startsWith('#{features * 2 // 3} ')")
        found["feature, ms"] = 1e3 * (time.perf_counter() - start)
        page.fill("#query", "the")
        page.wait_for_function("() => document.querySelector('#shown').textContent.includes(' of ')")
        start = time.perf_counter()
        page.press("#query", "m")
        page.wait_for_timeout(0)
        found["search, ms"] = 1e3 * (time.perf_counter() - start)
        page.fill("#query", "")
        rows = page.locator("#rows")
        for step in range(21):
            rows.evaluate("(rows, share) => { rows.scrollTop = share * rows.scrollHeight }", step / 20)
            page.evaluate("() => new Promise(requestAnimationFrame)")
        heap = page.context.new_cdp_session(page)
        heap.send("Performance.enable")
        figures = {m["name"]: m["value"] for m in heap.send("Performance.getMetrics")["metrics"]}
        found["heap, MB"] = figures["JSHeapUsedSize"] / 1e6
        start = time.perf_counter()
        page.evaluate("location.hash = '#map'")
        page.wait_for_selector("main canvas")
        found["map, ms"] = 1e3 * (time.perf_counter() - start)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def steered_after(feature: int) -> float:
    """Seconds from the command to the first piece of steered text."""
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "saekit", "serve", "tiny", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        edits = [{"feature": feature, "kind": "clamp", "strength": 1.0, "unit": "max"}]
        asking = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/stream", json.dumps({**STEER, "edits": edits}).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        while True:
            try:
                with urllib.request.urlopen(asking, timeout=60) as lines:
                    for line in lines:
                        event = json.loads(line)
                        if event["event"] == "text" and event["side"] == "steered":
                            return time.perf_counter() - start
                raise SystemExit("the server told no steered text")
            except (ConnectionError, urllib.error.URLError):
                if server.poll() is not None or time.perf_counter() - start > 120:
                    raise SystemExit("the server did not come up") from None
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait()


@contextmanager
def serving() -> Iterator[str]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "saekit", "serve", "tiny", "--port", str(port)], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


def screenshots(browser: Browser, site: Path, folder: Path, best: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    home = (site / "index.html").as_uri()
    with serving() as live:
        for size in SIZES:
            for scheme in ("light", "dark"):
                for name, address in VIEWS.items():
                    with opened(browser, home + address.format(best=best), size, scheme) as page:
                        page.screenshot(path=folder / f"{name}-{size}-{scheme}.png")
                with opened(browser, live + "#play", size, scheme) as page:
                    played(page)
                    page.screenshot(path=folder / f"play-{size}-{scheme}.png")


def played(page: Page) -> None:
    """Runs the playground's first proposal to its end."""
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[data-state=done]", timeout=120_000)


def pictures(browser: Browser, site: Path, best: int) -> None:
    home = (site / "index.html").as_uri()
    for name, address in (("page", f"#{best}"), ("map", "#map")):
        with opened(browser, home + address) as page:
            page.screenshot(path=DOCS / f"{name}.png")
    with serving() as live, opened(browser, live + "#play") as page:
        played(page)
        page.screenshot(path=DOCS / "playground.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=24_576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", type=Path, help="only write screenshots of every view into this folder")
    parser.add_argument("--pictures", action="store_true", help="only make the pictures of the docs")
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no chromium here")
    catalog = saekit.Catalog.open(embedded.folder("catalog"))
    best = catalog.search("Jedi")[0].index
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as play:
        folder = Path(scratch)
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if options.views or options.pictures:
            site = catalog.page(folder / "tiny", prompts=PROMPTS, model=saekit.load_model("tiny"))
            if options.views:
                screenshots(browser, site, options.views, best)
            if options.pictures:
                pictures(browser, site, best)
            return
        big = big_catalog(options.features, folder / "catalog")
        figures: dict[str, Any] = {"features": options.features, "write": written(big, folder / "site")}
        with opened(browser, (folder / "site" / "index.html").as_uri()):
            pass  # the browser's own first page
        rounds = [looked_at(browser, folder / "site", options.features) for _ in range(options.rounds)]
        browser.close()
        figures["rounds"] = rounds
        figures["steered, s"] = [steered_after(best) for _ in range(options.rounds)]
    for name, value in figures["write"].items():
        out.print(f"{'write: ' + name:28}{value:10.1f}")
    for name in rounds[0]:
        told(name, [each[name] for each in rounds])
    told("serve to steered text, s", figures["steered, s"])
    if options.features == parser.get_default("features"):
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


def told(name: str, values: list[float]) -> None:
    out.print(f"{name:28}{statistics.median(values):10.1f}   ({min(values):.1f}–{max(values):.1f})")


if __name__ == "__main__":
    main()
