"""A bucket on the loopback interface that pyarrow speaks S3 to: it counts what it is asked and may be out of order."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}
Query = dict[str, list[str]]


class FakeS3:
    """Objects by key. ``requests`` counts GET, HEAD, PUT, DELETE, POST and LIST; ``refuse`` gets the kind and the key
    of each and answers with the status to refuse it with, or 0.
    """

    def __init__(self, port: int) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.refuse: Callable[[str, str], int] = lambda kind, key: 0
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def uri(self, path: str) -> str:
        """How any process reaches a path of the bucket."""
        endpoint = self.address.replace(":", "%3A")
        return f"s3://key:secret@{BUCKET}/{path}?scheme=http&endpoint_override={endpoint}&region=us-east-1"

    def upload(self, folder: Path, prefix: str) -> None:
        """A local folder's files as objects."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()

    def refuse_first(self, number: int, status: int) -> None:
        """Refuses so many requests from now on, whatever they are."""
        left = [number]

        def refuse(kind: str, key: str) -> int:
            left[0] -= 1
            return status if left[0] >= 0 else 0

        self.refuse = refuse

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def fake_s3(port: int = 0) -> Iterator[FakeS3]:
    """A bucket that is there until the end of the block."""
    bucket = FakeS3(port)
    try:
        yield bucket
    finally:
        bucket.close()


def _handler(s3: FakeS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query, keep_blank_values=True)
            _, _, key = unquote(url.path).lstrip("/").partition("/")
            body = self._body()
            kind = "LIST" if "list-type" in query else self.command
            with s3.lock:
                s3.requests[kind] += 1
                status = s3.refuse(kind, key or query.get("prefix", [""])[0])
                answer = (status, _error(status), {}) if status else self._answer(kind, key, query, body)
            self._say(*answer)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def _body(self) -> bytes:
            data = b""
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
            else:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return _plain(data) if "x-amz-decoded-content-length" in self.headers else data

        def _answer(self, kind: str, key: str, query: Query, body: bytes) -> tuple[int, bytes, dict[str, str]]:
            match kind:
                case "LIST":
                    return 200, _listing(s3.objects, query), {}
                case "GET" | "HEAD":
                    return _content(s3.objects.get(key) if key else b"", self.headers.get("Range"))
                case "PUT" if "partNumber" in query:
                    s3.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
                case "PUT":
                    s3.objects[key] = body
                case "POST" if "uploads" in query:
                    name = str(len(s3.uploads))
                    s3.uploads[name] = {}
                    return 200, _xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>"), {}
                case "POST" if "uploadId" in query:
                    s3.objects[key] = b"".join(data for _, data in sorted(s3.uploads[query["uploadId"][0]].items()))
                    return 200, _xml("CompleteMultipartUploadResult", '<ETag>"0"</ETag>'), {}
                case "POST":
                    for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                        s3.objects.pop(name, None)
                    return 200, _xml("DeleteResult", ""), {}
                case "DELETE":
                    s3.objects.pop(key, None)
            return 200, b"", {"ETag": '"0"'}

        def _say(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def _content(data: bytes | None, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
    if data is None:
        return 404, _error(404), {}
    if wanted is None:
        return 200, data, {}
    first, last = wanted.removeprefix("bytes=").split("-")
    piece = data[int(first) : int(last) + 1 if last else None]
    return 206, piece, {"Content-Range": f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"}


def _listing(objects: dict[str, bytes], query: Query) -> bytes:
    """A page of at most 1000 keys, and of folders where a delimiter is given."""
    prefix, delimiter, after = (query.get(name, [""])[0] for name in ("prefix", "delimiter", "continuation-token"))
    entries: dict[str, str] = {}
    for key in sorted(key for key in objects if key.startswith(prefix)):
        folder, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if found:
            name = escape(f"{prefix}{folder}{delimiter}")
            entries.setdefault(name, f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>")
        else:
            size = f"<Size>{len(objects[key])}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            entries[escape(key)] = f"<Contents><Key>{escape(key)}</Key>{size}</Contents>"
    names = sorted(name for name in entries if name > after)
    page, is_cut = names[:1000], len(names) > 1000
    more = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if is_cut else ""
    about = f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}"
    return _xml("ListBucketResult", about + "".join(entries[name] for name in page))


def _plain(data: bytes) -> bytes:
    """A body of AWS's own chunks without them."""
    plain = b""
    while data:
        head, _, data = data.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        plain, data = plain + data[:size], data[size + 2 :] if size else b""
    return plain


def _error(status: int) -> bytes:
    return _xml("Error", f"<Code>{_CODES.get(status, 'Unknown')}</Code><Message>refused</Message>")


def _xml(name: str, inside: str) -> bytes:
    return f"<{name}>{inside}</{name}>".encode()
