"""Screenshots of the explorer's screens for the documentation; needs playwright and Debian's chromium.

python scripts/explorer_shots.py docs/explorer
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from trimtab.serve.config import HttpConfig
from trimtab.ui.explorer.host import Host

CASE = "m=llama-3.1-70b&on=h100&tp=4&b=16&p=4096&g=256"
COMPARED = "".join(
    f"&c=m%3Dllama-3.1-8b%26on%3D{machine}{'%26t%3D' + technique if technique else ''}"
    for machine in ("a100", "h100", "l40s", "4090")
    for technique in ("", "rtn%3Abits%3D4")
)
SCREENS = {
    "verdict": f"s=verdict&{CASE}&t=rtn:bits=4,group=32",
    "operators": f"s=operators&{CASE}&t=rtn:bits=4,group=32&sel=layers.*.mlp.down_proj",
    "sweep": f"s=sweep&{CASE}&tpot=40",
    "techniques": f"s=techniques&{CASE}&n=49&q=kv",
    "compare": f"s=compare&m=llama-3.1-8b&on=h100{COMPARED}",
    "measured": "s=measured&m=smollm2-135m&p=256&g=16",
}


def main(folder: Path) -> None:
    """Serve the explorer, open every screen once and save what is seen."""
    host = Host(HttpConfig(port=0))
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(host.run(ready.set)))
    thread.start()
    ready.wait()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
            for name, parts in SCREENS.items():
                page.goto("about:blank")
                page.goto(f"{host.url}#{parts}")
                page.get_by_role("heading", level=1).wait_for()
                page.wait_for_timeout(200)
                page.locator("[aria-busy=true], .busy").first.wait_for(state="detached", timeout=60_000)
                page.screenshot(path=folder / f"{name}.png")
            browser.close()
    finally:
        loop.call_soon_threadsafe(host.stop)
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/explorer"))
