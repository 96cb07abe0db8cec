"""Logs: one JSON object a line, each with an `action`; libraries' own records take the same way out."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger


def configure_logging(level: str = "info") -> None:
    """Send structlog and the standard library's records at or above `level` to stderr as JSON."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _foreign_action],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(_number(level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    # We write our own line per request, with its task and id; theirs would repeat it.
    logging.getLogger("uvicorn.access").disabled = True
    for chatty in ("httpx", "alembic", "sse_starlette"):
        logging.getLogger(chatty).setLevel(max(_number(level), logging.WARNING))


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose records are written `log.info(message, action="noun.verb", …)`."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _foreign_action(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Records of libraries carry the logger's name as their action."""
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event.setdefault("action", f"log.{record.name}")
    return event
