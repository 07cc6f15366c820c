"""Logs as JSON, one object a line: time, level, event, and what the event has to say.

In: Python's logging, ours and uvicorn's, and its warnings. Out: lines on a stream. An exception is logged by its type
and where it was raised: its message may quote a prompt.
"""

import json
import logging
import traceback
import warnings
from datetime import UTC, datetime
from typing import TextIO

from runtime.sections import UnfusedMessageWarning

_OURS = ("c2c_export", "engines", "runtime")
LEVELS = ("debug", "info", "warning", "error")


class JsonLines(logging.Formatter):
    """Formats a record, whose `fields` are those of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            content["exception"] = type(record.exc_info[1]).__name__
            content["frames"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(record.exc_info[2])
            ]
        return json.dumps(content, default=str)


def log_as_json(stream: TextIO, level: str, *, prompts: bool) -> None:
    """Let all logs of the process, and its warnings, go to `stream`; `prompts` allows warnings that quote one."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    # What other libraries have to say of ordinary days is not the server's log.
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    for package in _OURS:
        logging.getLogger(package).setLevel(level.upper())
    # A stream that nobody reads any more is no reason to write tracebacks.
    logging.raiseExceptions = False

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        quotes = issubclass(category, UnfusedMessageWarning) and not prompts
        text = "a message is read by all models but not fused" if quotes else str(message)
        root.warning("warning", extra={"fields": {"category": category.__name__, "message": text}})

    warnings.showwarning = show
