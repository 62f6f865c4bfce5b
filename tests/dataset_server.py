"""A hub of datasets on this machine, and a plain web server: what `datasets` asks for when it reads, with faults.

The folder `root` holds a folder for each dataset, such as `owner/name`; everything in it can also be had by its path.
"""

import json
import re
import threading
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class DatasetServer:
    """Serves a folder on a free port; a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.served: Counter[str] = Counter()
        """Bytes sent of each file, by its path."""
        self._faults: dict[str, list] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "DatasetServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, file: str, times: float, status: int | None = None) -> None:
        """Let the next `times` reads of a file end with a status, or cut the connection half-way."""
        self._faults[file] = [times, status]

    def take_fault(self, file: str) -> tuple[bool, int | None]:
        """Return whether a read of this file is to go wrong, and with which status."""
        fault = self._faults.get(file, [0, None])
        fault[0] -= 1
        return fault[0] >= 0, fault[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: DatasetServer, *args) -> None:
        self._hub = server
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := _API.fullmatch(path):
            return self._answer_api(*match.groups())
        match = _RESOLVE.fullmatch(path)
        self._send_file("/".join(match.groups()) if match else path.lstrip("/"))

    do_HEAD = do_POST = do_GET

    def _answer_api(self, name: str, kind: str | None, revision: str | None, inside: str | None) -> None:
        folder = self._hub.root / name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if not folder.is_dir():
            return self._send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if kind in (None, "revision"):
            siblings = [{"rfilename": file} for file in names]
            return self._send_json(200, {"id": name, "_id": "1", "sha": SHA, "siblings": siblings, "private": False})
        if kind == "paths-info":
            form = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            wanted = [form] if isinstance(form, str) else form
        else:
            wanted = names if not inside else [file for file in names if file.startswith(inside + "/")]
            if not wanted:
                return self._send_json(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            is_recursive = "recursive=true" in self.path.lower()
            depth = len(inside.split("/")) + 1 if inside else 1
            wanted = wanted if is_recursive else sorted({"/".join(file.split("/")[:depth]) for file in wanted})
        self._send_json(200, [self._entry(folder, file) for file in wanted if (folder / file).exists()])

    def _entry(self, folder: Path, file: str) -> dict:
        path = folder / file
        if path.is_dir():
            return {"type": "directory", "path": file, "oid": SHA, "size": 0}
        return {"type": "file", "path": file, "oid": SHA, "size": path.stat().st_size}

    def _send_json(self, status: int, payload: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(payload).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send_file(self, file: str) -> None:
        path = self._hub.root / file
        if not path.is_file():
            repository = self._hub.root.joinpath(*file.split("/")[:2])
            code = "EntryNotFound" if repository.is_dir() else "RepoNotFound"
            return self._send_json(404, {"error": "not found"}, {"X-Error-Code": code})
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{len(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        fails, wrong_status = self._hub.take_fault(file) if self.command == "GET" else (False, None)
        if fails and wrong_status is not None:
            return self._send_json(wrong_status, {"error": "something went wrong on the server"})
        if self.command == "GET":
            self._hub.served[file] += len(data)
        self._send(status, data, headers, cut=fails)

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
            self.connection.close()
