"""Log lines: JSON with the request id, or text. Never prompts, keys or token ids."""

import json
import logging
import sys
import time

from infermesh.telemetry import tracing

# What every record has; anything else came through `extra` and is a field of the line.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, service, logger, message, the trace id where
    something is traced, then the extra fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if trace_id := tracing.trace_id(fields.pop("traceparent", "")):
            line["trace_id"] = trace_id
        line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def get(name: str) -> logging.Logger:
    """The logger of a module; pass fields as `extra={"request_id": ...}`.

    Of a request whose span is not the current one pass `traceparent`, too: the line has its trace
    id, which is looked for only where the line is written.
    """
    return logging.getLogger(name)


def silence() -> None:
    """For a command that ends with one sentence: what is logged on the way would be another."""
    logging.getLogger().addHandler(logging.NullHandler())


def setup(service: str, level: str, style: str) -> None:
    """Sends the process's log lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "urllib3", "asyncio", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
