"""Who managed what, when, and how it ended: one JSON object a line in STATE_DIR/audit.log, for its owner alone.

Kept are the calls that may change something and those that were refused; what only looks is not.  The file is bounded:
past AUDIT_BYTES it becomes audit.log.1 and so on, and the oldest goes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from flask import Response

from routing import request_id
from routing.incoming import Incoming
from routing.reply import Reply
from web.auth import is_management, who

log = logging.getLogger("vllm_server.audit")

AUDIT_BYTES = 4 << 20
AUDIT_FILES = 4
LISTED = 1000           # entries that are kept in memory for GET /admin/audit
SHOWN = 200             # characters of a path or a message
LOOKS = frozenset({"GET", "HEAD", "OPTIONS"})


class AuditLog:
    """Thread-safe.  A disk that is full costs the entry on disk and one line in the daemon's log, never the call."""

    def __init__(self, path: Path, *, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._recent: deque[dict[str, Any]] = deque(maxlen=LISTED)
        self._file = _OwnersFile(path)

    def note(self, request: Incoming, response: Response | Reply) -> None:
        """Call it for every answer; what is not management is passed over."""
        if not is_management(request.path) or (request.method in LOOKS and response.status_code not in (401, 403)):
            return
        body = None
        if isinstance(response, Response) and response.is_json and not response.direct_passthrough:
            body = response.get_json(silent=True)   # it is ours; an engine's is on its way
        told = body if isinstance(body, dict) else {}
        error = told.get("error") if response.status_code >= 400 else None
        entry = {"at": round(self._wall(), 3), "who": who(request), "from": request.remote_addr,
                 "method": request.method, "path": request.path[:SHOWN], "id": told.get("id"),
                 "model": told.get("model_name"), "status": response.status_code,
                 "code": error.get("code") if isinstance(error, dict) else None, "request_id": request_id.current()}
        self._recent.append(entry)
        self._file.write(json.dumps(entry))

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest entries of this daemon's life, oldest first; at most LISTED."""
        return list(self._recent)[-count:] if count else []

    def close(self) -> None:
        self._file.close()


class _OwnersFile(RotatingFileHandler):
    """The standard library's, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=AUDIT_BYTES, backupCount=AUDIT_FILES - 1, encoding="utf-8", delay=True)
        self._broken = False

    def write(self, line: str) -> None:
        self.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def _open(self) -> Any:
        return open(os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        if self._failed != self._broken:
            self._broken = self._failed
            log.log(logging.ERROR if self._broken else logging.WARNING, "the audit log %s %s", self.baseFilename,
                    "cannot be written; management goes on without it" if self._broken else "is written again")

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed = True
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.close()
            self.stream = None
