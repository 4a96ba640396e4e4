"""What servers on other machines add to GET /v1/models.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from routing.remote import ServerView

DOWN = "down"


def add_servers(found: dict[str, dict[str, Any]], servers: Iterable[ServerView], own_name: str, created: int,
                owner: str) -> None:
    """Into the entries by name, those of this machine: `servers`, and `via`.

    `via` says through which vllm-servers a request would go, this one first: another one that asks knows by it what
    would come back to itself.
    """
    for entry in found.values():
        entry |= {"servers": [], "via": [own_name]}
    for server in servers:
        for name, offer in server.models.items() if not server.leaving else ():
            status = DOWN if not server.status.takes_requests else "ready" if offer.warm else "unloaded"
            entry = found.setdefault(name, {"id": name, "object": "model", "created": created, "owned_by": owner,
                                            "root": name, "status": status, "instances": [], "servers": [], "via": []})
            entry["servers"].append({"url": server.url, "status": status})
            if status == "ready" or (entry["status"] == DOWN and status != DOWN):
                entry["status"] = status
            path = [own_name, *offer.path]
            if not entry["via"] or len(path) < len(entry["via"]):
                entry["via"] = path
