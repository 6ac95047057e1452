"""`python -m fairlead.runtime forkserver FD LOG_LEVEL LOG_FORMAT`: the process that replicas are forked from."""

import sys

from fairlead.observe.logs import configure_logs
from fairlead.runtime.forkserver import serve_forks


def main(arguments: list[str]) -> int:
    match arguments:
        case ["forkserver", fd, level, style] if fd.isdecimal():
            configure_logs(level, style)  # type: ignore[arg-type]
            return serve_forks(int(fd))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
