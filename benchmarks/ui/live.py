"""Whether a tab that is left open grows: python -m benchmarks.ui.live [--minutes 60] [--every 60]

The overview is looked at while requests come. Its JavaScript heap is read after a garbage collection, as is the number of nodes.
"""

import argparse
import time

from benchmarks.ui.room import chromium, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two readings")
    options = parser.parse_args()
    with served() as server, chromium() as browser:
        page = browser.new_context(viewport={"width": 1360, "height": 860}).new_page()
        page.goto(f"{server.ops}/ui/overview")
        page.get_by_text("models ready").wait_for()
        devtools = page.context.new_cdp_session(page)
        devtools.send("HeapProfiler.enable")
        end = time.monotonic() + options.minutes * 60
        first = None
        while True:
            devtools.send("HeapProfiler.collectGarbage")
            heap = devtools.send("Runtime.getHeapUsage")["usedSize"] / 1e6
            nodes = devtools.send("Memory.getDOMCounters")["nodes"]
            first = heap if first is None else first
            print(f"{time.strftime('%H:%M:%S')}  heap {heap:6.2f} MB ({heap - first:+.2f})  {nodes} nodes", flush=True)
            if time.monotonic() >= end:
                break
            page.wait_for_timeout(min(options.every, max(end - time.monotonic(), 0.1)) * 1e3)
        print(f"grown by {heap - first:.2f} MB in {options.minutes:g} minutes")


if __name__ == "__main__":
    main()
