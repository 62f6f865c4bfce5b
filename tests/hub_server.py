"""A model hub on this machine: what `huggingface_hub` asks for when it uploads and downloads a model, with faults.

Every fault is asked for by the name of a route (see `ROUTES`) and a number of times.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

from hub_store import READER, WRITER, HubStore, Refusal
from huggingface_hub import constants
from huggingface_hub.utils import _http
from huggingface_hub.utils._xet import abort_xet_session

_NAME = r"/api/models/([^/]+/[^/]+)"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "branch": ("POST", rf"{_NAME}/branch/([^/]+)"),
    "info": ("GET", _NAME),
    "info_at": ("GET", rf"{_NAME}/revision/([^/]+)"),
    "tree": ("GET", rf"{_NAME}/tree/([^/]+)(?:/(.+))?"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"{_NAME}/preupload/([^/]+)"),
    "commit": ("POST", rf"{_NAME}/commit/([^/]+)"),
    "batch": ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "object": ("PUT", r"/lfs/object/(\w+)"),
    "part": ("PUT", r"/lfs/part/(\w+)/(\d+)"),
    "complete": ("POST", r"/lfs/complete/(\w+)"),
    "verify": ("POST", r"/lfs/verify/(\w+)"),
    "xet_token": ("GET", rf"{_NAME}/xet-write-token/([^/]+)"),
    "xorb": ("POST", r"/v1/xorbs/default/(\w+)"),
    "shard": ("POST", r"/v1/shards"),
    "resolve": ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
}
_FOR_WRITERS = ("create", "preupload", "batch", "commit", "branch", "xet_token")
_PRESIGNED = ("object", "part", "complete")


@dataclass
class Fault:
    """What goes wrong `times` times: an error status, a cut connection, or a body that arrives changed."""

    route: str
    times: float
    status: int | None = None
    cut: bool = False
    is_applied: bool = False  # the request does its work, only the answer is lost
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None


class HubServer(HubStore):
    """A hub on a free port; a context manager.

    Args:
        part_size: objects larger than this are uploaded in parts.
        verifies: offer the step in which an uploaded object is checked.
    """

    def __init__(self, part_size: float = float("inf"), verifies: bool = True) -> None:
        super().__init__()
        self.part_size, self.verifies = part_size, verifies
        self.requests: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.errors: list[Exception] = []
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        assert not self.errors, self.errors

    def fail(self, route: str, times: float = 1, **what) -> None:
        """Let the next `times` requests to a route go wrong, after those for which this was said before."""
        assert route in ROUTES
        self.faults.append(Fault(route, times, **what))

    def take_fault(self, route: str) -> Fault | None:
        """Count a request, and return what is to go wrong with it."""
        with self._lock:
            self.requests[route] += 1
            for fault in self.faults:
                if fault.route == route and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, route: str, path: str, body: bytes, token: str | None) -> tuple[dict[str, str], object]:
        """Do what a request asks for; return headers and payload of the answer, or raise `Refusal`."""
        if route not in _PRESIGNED and token not in (WRITER, READER):
            raise Refusal(401, "Invalid username or password.")
        if token == READER and route in _FOR_WRITERS:
            raise Refusal(403, "You have no right to write here.")
        groups = re.fullmatch(ROUTES[route][1], path).groups()
        with self._lock:
            result = getattr(self, f"_{route}")(*[unquote(group or "") for group in groups], body=body)
        return result if isinstance(result, tuple) else ({}, result)


def connect(monkeypatch, hub: HubServer, cache: Path, *, token: str | None = WRITER, xet: bool = False) -> list[float]:
    """Let `huggingface_hub` in this process talk to `hub`; return the list of the seconds it would have waited.

    Args:
        monkeypatch: of pytest, which undoes it.
        hub: a running server.
        cache: an empty folder, so that nothing is taken from, or left in, the user's.
        token: of the login, or `None` for none.
        xet: upload through Xet.
    """
    waits: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": waits.append}))
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    environment = {
        "HF_TOKEN": token or "",
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_XET_XORB_COMPRESSION_POLICY": "none",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        "HF_XET_TELEMETRY_ENABLED": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    abort_xet_session()  # the next one reads the environment again
    return waits


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in several small packets would wait for their acknowledgement

        def log_message(self, *args) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, BrokenPipeError):
                self.close_connection = True

        def _serve(self) -> None:
            path = urlsplit(self.path).path
            method = "GET" if self.command == "HEAD" else self.command
            routes = [name for name, (verb, form) in ROUTES.items() if verb == method and re.fullmatch(form, path)]
            if not routes:
                self._read_body()
                return self._send(404, {}, {"error": f"Not found: {self.command} {path}"})
            fault = hub.take_fault(routes[0])
            if fault and fault.cut and not fault.is_applied:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                return self._hang_up()
            body = self._read_body()
            if fault and fault.change:
                body = fault.change(body)
            if fault and fault.status and not fault.is_applied:
                return self._send(fault.status, fault.headers, {"error": "something went wrong on the server"})
            status, headers, payload = self._answer(routes[0], path, body)
            if fault and fault.is_applied and fault.cut:
                return self._hang_up()
            if fault and fault.is_applied:
                return self._send(fault.status, fault.headers, {"error": "the answer was lost"})
            self._send(status, headers, payload)

        def _answer(self, route: str, path: str, body: bytes) -> tuple[int, dict[str, str], object]:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            try:
                return 200, *hub.answer(route, path, body, token)
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                return refusal.status, headers, {"error": refusal.message, **refusal.payload}
            except Exception as error:
                hub.errors.append(error)
                return 500, {}, {"error": repr(error)}

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, headers: dict[str, str], payload: object) -> None:
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if not isinstance(payload, bytes):
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

    return Handler
