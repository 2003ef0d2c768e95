"""A proxy in front of the S3 server, as its own process: fails a share of requests and delays chosen ones, when told to.

`python s3_proxy.py PORT UPSTREAM_PORT`. GET /_faults?fail_every=20&slow=shard-00003&slow_s=2&range_s=0.1 sets the faults:
deny_after=N refuses all reads of objects after N of them with 403, and down_s=S closes every connection without an answer for S s;
every 20th request fails, by turns with an answer 503 and with a connection closed without one; reads of shard-00003 take 2 s
longer, other range reads 0.1 s. Every answer of /_faults is the JSON of what was done since the last: {"requests", "failed",
"slowed"}, and of range reads {"most_at_once", "first_s", "last_s"}, the last two by a clock.
"""

import http.client
import json
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP = {"connection", "transfer-encoding", "keep-alive"}


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream_port = 0
    lock = threading.Lock()
    faults: dict[str, str] = {}  # noqa: RUF012  # one set for the process
    counts: dict[str, float] = dict.fromkeys(("requests", "failed", "slowed", "most_at_once", "first_s", "last_s"), 0)
    at_once = reads = 0
    down_until = 0.0

    def handle_any(self) -> None:
        body = self.read_body()
        if self.path.startswith("/_faults"):
            self.control()
            return
        with self.lock:
            self.counts["requests"] += 1
            every = int(self.faults.get("fail_every", 0))
            turn = self.counts["requests"] // every if every and self.counts["requests"] % every == 0 else 0
            self.counts["failed"] += bool(turn)
            is_read = self.command == "GET" and "list-type" not in self.path
            Proxy.reads += is_read
            denied = is_read and self.reads > int(self.faults.get("deny_after", 10**9))
            slow = "slow" in self.faults and self.faults["slow"] in self.path and self.command == "GET"
            self.counts["slowed"] += slow
        if slow:
            time.sleep(float(self.faults["slow_s"]))
        elif "Range" in self.headers:
            self.sleep_in_range(float(self.faults.get("range_s", 0)))
        if time.monotonic() < self.down_until:
            self.close_connection = True
        elif denied:
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>no longer</Message></Error>")
        elif turn % 2:
            self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>")
        elif turn:
            self.close_connection = True
        else:
            self.forward(body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def sleep_in_range(self, seconds: float) -> None:
        with self.lock:
            self.counts["first_s"] = self.counts["first_s"] or time.monotonic()
            Proxy.at_once += 1
            self.counts["most_at_once"] = max(self.counts["most_at_once"], self.at_once)
        time.sleep(seconds)
        with self.lock:
            self.counts["last_s"] = time.monotonic()
            Proxy.at_once -= 1

    def forward(self, body: bytes) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP | {"expect"}}
            upstream.request(self.command, self.path, body=body, headers=headers)
            reply = upstream.getresponse()
            self.answer(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            upstream.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in HOP | {"content-length"}:
                self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", headers.get("Content-Length", "0") if head else str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def control(self) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        with self.lock:
            Proxy.faults, done, Proxy.reads = query, dict(self.counts), 0
            Proxy.down_until = time.monotonic() + float(query.get("down_s", 0))
            self.counts.update(dict.fromkeys(self.counts, 0))
        self.answer(200, {}, json.dumps(done).encode())

    def log_message(self, *_: object) -> None:
        """Says nothing: its output is nobody's."""


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # with the usual 5, connections of a busy moment hang for seconds
    daemon_threads = True


if __name__ == "__main__":
    Proxy.upstream_port = int(sys.argv[2])
    server = Server(("127.0.0.1", int(sys.argv[1])), Proxy)
    server.serve_forever()
