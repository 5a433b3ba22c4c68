"""Who may use the server: no other web page in its user's browser, and beyond this machine nobody without the key."""

import hmac
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from robopoet.serving.protocol import RequestError, error_body

HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},
    413: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}


def refusal(e: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The response that says why a request is refused; headers: instead of its status's own."""
    return Response(error_body(e), e.status, headers or HEADERS.get(e.status), "application/json")


class Guard:
    """Refuses requests with a foreign Host (a name that was rebound to this machine) or Origin, or without the key.

    hosts, origins: what is allowed beside this machine's own. key: asked for under /v1 and for /metrics; "" for none.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str], key: str):
        self.app, self.origins, self.key = app, set(origins), key.encode()
        self.hosts = {"localhost", "127.0.0.1", "::1", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        await (refusal(problem) if problem else self.app)(scope, receive, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and _name(host) not in self.hosts | {scope["server"][0]}:
            return RequestError(f"host: found {host[:100]!r}, which serve.py --allow_hosts=NAME would allow", 403)
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & self.origins:
            return RequestError(f"origin: found {origin[:100]!r}, which serve.py --allow_origins would allow", 403)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self.key)
        if self.key and scope["path"].startswith(("/v1", "/metrics")) and not known:
            return RequestError("authorization: must be Bearer and the server's API key", 401, code="invalid_api_key")
        return None


def _name(host: str) -> str | None:
    """A Host header without its port and brackets, in lower case."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
