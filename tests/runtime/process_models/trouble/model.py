"""Does the wrong thing it is asked to do."""

import os
import sys
import time
from pathlib import Path

from fairlead.core.errors import InvalidRequest


class Overheated(InvalidRequest):
    pass


class Trouble:
    batched = False
    example = {"do": [b"nothing"]}

    def load(self, context):
        self.began = context.parameters.get("began")
        broken = context.parameters.get("broken")
        if broken and Path(broken).exists():  # a FIFO: returns when the test has it open
            Path(broken).write_text("broken")
            raise RuntimeError("broken meanwhile")

    def infer(self, inputs):
        match inputs["do"][0]:
            case b"raise":
                raise ZeroDivisionError("7 / 0")
            case b"refuse":
                raise InvalidRequest("input 'do' is not nice")
            case b"overheat":
                raise Overheated("too hot")
            case b"leave":
                sys.exit(3)
            case b"complain at length":
                raise ValueError("x" * 10_000_000)
            case b"answer with a number":
                return 7
            case b"answer with dates":
                import numpy as np

                return {"done": np.array(["2020-01-01"], dtype="datetime64[D]")}
            case b"die":
                os._exit(7)
            case b"hang":
                Path(self.began).write_text("hanging")  # a FIFO: returns when the test has it open
                time.sleep(3600)
            case b"babble":
                for entry in os.listdir("/proc/self/fd"):
                    if os.path.exists(link := f"/proc/self/fd/{entry}") and os.readlink(link).startswith("socket:"):
                        os.write(int(entry), b"GET / HTTP/1.1\r\n\r\n")
        return {"done": inputs["do"]}
