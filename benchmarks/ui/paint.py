"""How soon the dashboard is there, and how much is sent for it: python -m benchmarks.ui.paint [--tries 5]

Each try has an empty cache. First contentful paint is the browser's own number; "numbers" is when the first live ones stand there.
"""

import argparse
import statistics
import time

from benchmarks.ui.room import chromium, served
from fairlead.api.ui.files import Files

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
SENT = """performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))
  .filter((each) => !each.name.endsWith('/ui/live')).reduce((sum, each) => sum + each.transferSize, 0)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    tries = parser.parse_args().tries
    paints, numbers, sent = [], [], []
    with served() as server, chromium() as browser:
        for _ in range(tries):
            context = browser.new_context(viewport={"width": 1360, "height": 860})
            page = context.new_page()
            began = time.perf_counter()
            page.goto(f"{server.ops}/ui/overview", wait_until="commit")
            page.get_by_text("models ready").wait_for()
            numbers.append((time.perf_counter() - began) * 1e3)
            page.wait_for_timeout(500)
            paints.append(page.evaluate(PAINT))
            sent.append(page.evaluate(SENT))
            context.close()
    scripts = {name: len(file.zipped) for name, file in Files().by_name.items() if name.endswith(".js")}
    print(f"first contentful paint: median {statistics.median(paints):.0f} ms, worst {max(paints):.0f} ms of {tries}")
    print(f"first live numbers:     median {statistics.median(numbers):.0f} ms, worst {max(numbers):.0f} ms")
    print(f"sent for the overview:  {statistics.median(sent) / 1024:.0f} KiB, everything")
    print(f"all scripts, gzipped:   {sum(scripts.values()) / 1024:.0f} KiB in {len(scripts)} files")
    for name, size in sorted(scripts.items(), key=lambda each: -each[1])[:5]:
        print(f"    {size / 1024:5.1f} KiB  {name}")


if __name__ == "__main__":
    main()
