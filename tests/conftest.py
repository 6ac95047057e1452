"""What all tests share."""

import structlog

structlog.configure(
    processors=[structlog.processors.add_log_level, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
)
