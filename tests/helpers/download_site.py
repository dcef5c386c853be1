"""A web server that can resume files, a hub on it, and archives to serve."""

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class Site:
    """Files served under /HOST/PATH, as DOWNLOAD_MIRROR asks for them, or /PATH for HF_ENDPOINT.

    Attributes:
        files: contents by path; a tuple (contents, headers) adds headers, a string is a URL to redirect to.
        requests: (method, path, Range header) in order.
        ranges: whether parts of files are served.
        if_range: whether parts are refused to those who have other contents.
        cuts: how many bytes the next answers send before the connection breaks.
    """

    def __init__(self):
        self.files, self.requests, self.ranges, self.if_range, self.cuts = {}, [], True, True, []
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

    def publish(self, path: str, contents: bytes, large: bool = True) -> None:
        """A file of a hub repository, with the headers huggingface_hub looks for; large ones live on another server."""
        if not large:
            etag = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
            self.files[path] = (contents, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            return
        digest, stored = hashlib.sha256(contents).hexdigest(), f"storage.example/{path}"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(contents)), "X-Repo-Commit": COMMIT}
        # under another name of this machine, which huggingface_hub does not follow when it asks for the headers
        self.files[path] = (f"{self.url.replace('127.0.0.1', 'localhost')}/{stored}", linked)
        self.files[stored] = contents

    def answer(self, request):
        path, asked = request.path.split("?")[0].lstrip("/"), request.headers.get("Range")
        self.requests.append((request.command, path, asked))
        if path not in self.files:
            request.send_error(404)
            return
        found = self.files[path]
        contents, headers = found if isinstance(found, tuple) else (found, {})
        if isinstance(contents, str):
            self.send(request, 302, {"Location": contents, "Content-Length": "0"} | headers)
            return
        headers = {"ETag": f'"{hashlib.md5(contents).hexdigest()}"'} | headers
        same = not self.if_range or request.headers.get("If-Range") in (None, headers["ETag"])
        resumes = asked and self.ranges and same
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if resumes else 0
        if resumes and start >= len(contents):
            self.send(request, 416, {"Content-Range": f"bytes */{len(contents)}", "Content-Length": "0"} | headers)
            return
        if resumes:
            headers = {"Content-Range": f"bytes {start}-{len(contents) - 1}/{len(contents)}"} | headers
        self.send(request, 206 if resumes else 200, {"Content-Length": str(len(contents) - start)} | headers)
        if request.command == "GET":
            end = start + self.cuts.pop(0) if self.cuts else None
            request.wfile.write(contents[start:end])

    @staticmethod
    def send(request, status, headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()


def zipped(path: Path, **members: bytes) -> Path:
    path.write_bytes(zip_bytes(members))
    return path


def zip_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, contents in members.items():
            z.writestr(name, contents)
    return file.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return file.getvalue()


def tree(folder):
    """Files below a folder, but for those that mark an archive as unpacked."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".done"}
