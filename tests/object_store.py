"""What a model may be fetched from, on loopback: an S3 bucket, and the hub's API for one model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 2  # keys per listing: every test has several pages


class Store:
    """Objects of one bucket, or files of one model at one commit.

    Attributes:
        asked: method and path of every request so far.
        refusal: answered to every request in place of what it wants; None: nothing is refused.
    """

    bucket = "models"
    model = "org/tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.refusal: tuple[int, str] | None = None
        self.url = ""

    def downloads(self, name: str) -> int:
        """How often an object was asked for from its beginning."""
        return sum(one.startswith("GET") and one.endswith(f"/{name}") for one in self.asked)

    def listing(self, query: dict[str, list[str]]) -> bytes:
        """A page of ListObjectsV2."""
        prefix = query.get("prefix", [""])[0]
        begin = int(query.get("continuation-token", ["0"])[0])
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        page, is_more = keys[begin : begin + _PAGE], len(keys) > begin + _PAGE
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size></Contents>"
            for key in page
        )
        more = f"<NextContinuationToken>{begin + _PAGE}</NextContinuationToken>" if is_more else ""
        text = f"<IsTruncated>{str(is_more).lower()}</IsTruncated>{more}{entries}"
        return f"<ListBucketResult>{text}</ListBucketResult>".encode()

    def described(self, *, tree: bool) -> bytes:
        """The hub's answer about the model, or about its files."""
        files = [
            {"type": "file", "path": name, "oid": self.commit, "size": len(data)}
            for name, data in self.objects.items()
        ]
        siblings = [{"rfilename": name} for name in self.objects]
        model = {"id": self.model, "sha": self.commit, "siblings": siblings}
        return json.dumps(files if tree else model).encode()


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        store, split = self.store, urlsplit(self.path)
        path = unquote(split.path)
        store.asked.append(f"{self.command} {path}")
        store.tokens.add(self.headers.get("Authorization", ""))
        if store.refusal is not None:
            status, code = store.refusal
            self._answer(status, f"<Error><Code>{code}</Code></Error>".encode())
        elif "list-type" in split.query:
            self._answer(200, store.listing(parse_qs(split.query)))
        elif path.startswith(f"/api/models/{store.model}"):
            data = store.described(tree="/tree/" in path)
            self._answer(200, data, kind="application/json")
        else:
            self._object(path)

    def _object(self, path: str) -> None:
        places = (f"/{self.store.bucket}/", f"/{self.store.model}/resolve/{self.store.commit}/")
        for place in places:
            data = self.store.objects.get(path.removeprefix(place))
            if path.startswith(place) and data is not None:
                self._whole_or_range(data)
                return
        self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _whole_or_range(self, data: bytes) -> None:
        """Large objects are asked for in parts."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data)
            return
        begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if begin:
            self.store.asked[-1] += f"?from={begin}"
        part = data[begin : end + 1]
        self._answer(206, part, span=f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")

    def _answer(
        self, status: int, data: bytes, kind: str = "application/xml", span: str = ""
    ) -> None:
        self.send_response(status)
        if span:
            self.send_header("Content-Range", span)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.store.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(objects: dict[str, bytes]) -> Iterator[Store]:
    """A store that answers inside the block."""
    store = Store(objects)
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
