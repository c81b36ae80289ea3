"""Kubernetes' API over HTTP: JSON in and out, and streams as bytes.

No client library stands between: the official one checks every body against models of its own version, takes a second to be
imported, and breaks on a log that is not UTF-8. What an API server says is translated here, and nothing else leaves.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import EngineError, EngineUnavailable, OasisError
from .kube_access import HOW_TO_GET_ACCESS, Access

if TYPE_CHECKING:
    import urllib3

# A connection whose other end has gone silently is given up after some 40 s: no watch and no log waits for ever.
ALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
]
_TIMEOUT = 30.0
# 429 and these are an API server that is busy, or a balancer before one that is away.
PASSING = (429, 500, 502, 503, 504)


class Refused(Exception):
    """The API server's answer is no. Internal to the engine: `translated` makes an error of the package of it."""

    def __init__(self, status: int, words: str, reason: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.reason = status, words, reason

    def translated(self, doing: str) -> OasisError:
        """The error that this answer stands for; `doing` completes "The cluster refused …"."""
        if self.status == 401:
            return EngineError(f"The cluster does not know this process. {HOW_TO_GET_ACCESS} It said: {self.words}")
        if self.status == 403:
            return EngineError(
                f"The cluster refused {doing}. Give this process the rights in deployments/kubernetes/rbac.yaml. "
                f"It said: {self.words}"
            )
        return EngineError(f"The cluster refused {doing} (HTTP {self.status}). It said: {self.words}")


class KubeApi:
    """Requests to one API server; safe to share between threads. `calls` counts them by method and kind."""

    def __init__(self, access: Access) -> None:
        import urllib3

        self.access = access
        self.calls: dict[str, int] = {}
        more: dict[str, Any] = {"socket_options": ALIVE, "maxsize": 64, "retries": False}
        if access.tls is not None:
            more["ssl_context"] = access.tls
        proxy = access.proxy
        self._pool: urllib3.PoolManager = urllib3.ProxyManager(proxy, **more) if proxy else urllib3.PoolManager(**more)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        patience_seconds: float = 20.0,
    ) -> dict[str, Any]:
        """Ask, and return the answer; as long as the server is away or busy, ask again, `patience_seconds` long.

        Raises:
            Refused: it said no.
            EngineUnavailable: it did not answer.
        """
        until, pause = time.monotonic() + patience_seconds, 1.0
        while True:
            try:
                response = self._request(method, path, body, query, timeout=_TIMEOUT, preload=True)
                data = response.data
                if response.status < 300:
                    return dict(json.loads(data)) if data else {}
                refused = refusal(response.status, data)
                if response.status not in PASSING or time.monotonic() + pause > until:
                    raise refused
            except EngineUnavailable:
                if time.monotonic() + pause > until:
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def stream(self, path: str, query: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """An answer whose body is still to be read; whoever asked closes it.

        Raises:
            Refused: it said no.
            EngineUnavailable: it did not answer.
        """
        import urllib3

        response = self._request("GET", path, None, query, timeout=urllib3.Timeout(connect=10.0, read=None), preload=False)
        if response.status >= 300:
            data = response.read(1 << 16)
            response.close()
            raise refusal(response.status, data)
        return response

    def count(self, kind: str) -> None:
        """Note a request of a kind, such as `list pods`."""
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def version(self) -> str:
        """The API server's version, such as v1.32.4."""
        return str(self.call("GET", "/version", patience_seconds=0).get("gitVersion", "of unknown version"))

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str] | None,
        *,
        timeout: Any,
        preload: bool,
    ) -> urllib3.BaseHTTPResponse:
        import urllib3

        self.count(_verb(method, path, query))
        headers = {"Accept": "application/json", "User-Agent": "oasis-flows", **self.access.headers()}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode("utf-8", "surrogateescape")
        url = f"{self.access.server}{path}" + ("?" + _encoded(query) if query else "")
        try:
            return self._pool.request(
                method, url, body=data, headers=headers, timeout=timeout, preload_content=preload, retries=False, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EngineUnavailable(
                f"The cluster at {self.access.server} did not answer. {HOW_TO_GET_ACCESS} The cause: {type(error).__name__}: {error}"
            ) from error


def _encoded(query: Mapping[str, str]) -> str:
    from urllib.parse import urlencode

    return urlencode(query)


def refusal(status: int, data: bytes) -> Refused:
    """What an answer that is no success means."""
    try:
        told = json.loads(data)
        return Refused(status, str(told.get("message") or data.decode(errors="replace")), str(told.get("reason") or ""))
    except (ValueError, AttributeError):
        return Refused(status, data[:1000].decode(errors="replace").strip() or f"HTTP {status}")


def _verb(method: str, path: str, query: Mapping[str, str] | None) -> str:
    """A request as RBAC names it: `list pods`, `get pods/log`."""
    if not path.startswith(("/api/", "/apis/")):
        return f"get {path}"
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[0] == "namespaces" and len(parts) > 2:
        parts = parts[2:]
    resource = parts[0] + (f"/{parts[2]}" if len(parts) > 2 else "")
    named = len(parts) > 1
    if method == "GET":
        verb = "watch" if (query or {}).get("watch") else "get" if named else "list"
    else:
        verb = {"POST": "create", "DELETE": "delete" if named else "deletecollection", "PATCH": "patch", "PUT": "update"}[
            method
        ]
    return f"{verb} {resource}"
