"""`python -m fairlead.llm.kernels`: compile the kernels ahead of the first start. Done at install; it never fails one."""

import sys
import time

from fairlead.llm.kernels import build


def main() -> None:
    start = time.monotonic()
    try:
        library = build.build(
            progress=lambda line: print(f"kernels: {line} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        )
    except build.BuildError as error:
        print(f"kernels: the language-model engine falls back to torch's own: {error}", file=sys.stderr)
    else:
        print(library)


if __name__ == "__main__":
    main()
