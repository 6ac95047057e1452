"""A process that records one request every two milliseconds and says which, until it is told to stop: see test_usage.py."""

import asyncio
import signal
import sys
import time

from fairlead.gateway.usage import UsageLog
from fairlead.observe.counts import Counts
from fairlead.store.rows import UsageRow
from fairlead.store.store import Store


async def main(url: str, flush_seconds: float) -> None:
    store = Store.open(url)
    log = UsageLog(store, flush_seconds, Counts())
    log.start()
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    number = 0
    while not asked.is_set():
        log.add(UsageRow(time=time.time(), request_id=str(number), tenant="t", model="m", outcome="success"))
        print(number, time.time(), flush=True)
        number += 1
        await asyncio.sleep(0.002)
    await log.stop()
    store.close()


asyncio.run(main(sys.argv[1], float(sys.argv[2])))
