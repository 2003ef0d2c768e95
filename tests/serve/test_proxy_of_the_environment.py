"""Nothing of ours on loopback goes through a proxy that the environment names."""

import http.server
import threading
from pathlib import Path

import pytest

from raycap.serving.run import DIRECT


def test_our_own_questions_to_loopback_use_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.delenv("no_proxy", raising=False)
    try:
        with DIRECT.open(f"http://127.0.0.1:{server.server_port}/readyz", timeout=10) as answer:
            assert answer.status == 200
    finally:
        server.shutdown()
    root = Path(__file__).parents[2]
    for source in (*(root / "raycap").rglob("*.py"), *(root / "jobs").glob("*.py")):
        assert "urlopen(" not in source.read_text(), source
