"""`python -m fairlead.runtime forkserver FD LOG_LEVEL LOG_FORMAT [texts]`: the process that replicas are forked from."""

import sys

from fairlead.observe.logs import configure_logs
from fairlead.runtime.forkserver import serve_forks


def main(arguments: list[str]) -> int:
    match arguments:
        case ["forkserver", fd, level, style, *more] if fd.isdecimal() and more in ([], ["texts"]):
            configure_logs(level, style, texts=bool(more))  # type: ignore[arg-type]
            return serve_forks(int(fd))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
