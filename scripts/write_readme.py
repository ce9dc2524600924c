"""Write what `make demo` printed into README.md, and a picture of its report into docs/images/.

make demo | tee demo.log
python scripts/write_readme.py demo.log abliterate-demo
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- output of make demo -->", "<!-- end -->"
FIRST = "model"  # of the header of the first table
CHOSEN, LAST = "chosen: ", "tokens: "
WIDTH, HEIGHT = 1000, 900


def output(log: str) -> str:
    """The table of refusals, the choice and the checks: the rest is in the picture."""
    lines = [line.rstrip() for line in log.splitlines()]
    header = next(number for number, line in enumerate(lines) if re.search(rf"[┃|] {FIRST} ", line))
    end = next(number for number in range(header, len(lines)) if lines[number].startswith("└"))
    chosen = next(number for number in range(end, len(lines)) if lines[number].startswith(CHOSEN))
    last = next(number for number in range(chosen, len(lines)) if lines[number].startswith(LAST))
    return "\n".join([*lines[header - 1 : end + 1], "…", *lines[chosen : last + 1]])


def main() -> None:
    log, folder = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n```text\n{output(log)}\n```\n{END}{after}", encoding="utf-8")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto((folder / "report.html").absolute().as_uri())
        picture = ROOT / "docs/images/report.png"
        picture.parent.mkdir(exist_ok=True)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
