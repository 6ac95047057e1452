"""What watches one server: put together here, of parts that know nothing of each other."""

from fairlead.observe.finished import Finished


class Telemetry:
    """Of one server."""

    def __init__(self) -> None:
        self.finished = Finished()
