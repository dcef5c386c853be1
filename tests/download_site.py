"""A web server that can resume files, and archives to serve."""

import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files served under /HOST/PATH, as DOWNLOAD_MIRROR asks for them.

    Attributes:
        files: contents by path; a tuple (contents, headers) adds headers.
        requests: (method, path, Range header) in order.
        ranges: whether parts of files are served.
        cut: bytes after which the connection breaks, once.
    """

    def __init__(self):
        self.files, self.requests, self.ranges, self.cut = {}, [], True, None
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        path, asked = request.path.split("?")[0].lstrip("/"), request.headers.get("Range")
        self.requests.append((request.command, path, asked))
        if path not in self.files:
            request.send_error(404)
            return
        found = self.files[path]
        contents, headers = found if isinstance(found, tuple) else (found, {})
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if asked and self.ranges and start >= len(contents):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(contents)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if asked and self.ranges else 200)
        request.send_header("Content-Length", str(len(contents) - start))
        if asked and self.ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(contents) - 1}/{len(contents)}")
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            end, self.cut = (self.cut, None) if self.cut else (None, None)
            request.wfile.write(contents[start:end])


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as z:
        for name, contents in members.items():
            z.writestr(name, contents)
    return path


def tree(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
