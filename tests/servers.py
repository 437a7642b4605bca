"""Local servers with OpenAI's interface: one that fails as told and counts its answers, and vLLM's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

Answer = Callable[[str], str]  # the last message -> the text
Faults = Callable[[str, int], str]  # the last message and the number of tries before -> a fault, "" for none
RETRY_AFTER_S = 0.5


class FakeServer(ThreadingHTTPServer):
    """Every prompt has 7 tokens and every answer 3.

    Faults: a status; `hang` (no answer until the client goes), `cut` (half of the body), `broken` (half of
    the JSON), `html`, `empty` (no choices). 429 says Retry-After.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer, faults: Faults = lambda text, tries: "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults = answer, faults
        self.lock = threading.Lock()
        self.seen: dict[str, list[float]] = defaultdict(list)  # last message -> times of its requests
        self.answered = Counter[str]()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.busy = self.busiest = 0  # requests at once

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        host = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with host.lock:
            host.busy += 1
            host.busiest = max(host.busiest, host.busy)
            fault = host.faults(text, len(host.seen[text]))
            host.seen[text].append(monotonic())
            host.bodies.append(body)
            host.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
        try:
            sleep(0.01)
            self._reply(text, fault)
        finally:
            with host.lock:
                host.busy -= 1

    def _reply(self, text: str, fault: str) -> None:
        choice = {"message": {"content": self.server.answer(text)}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        whole = json.dumps({"choices": [choice], "usage": usage})
        if fault == "hang":
            self.rfile.read(1)  # nothing comes until the connection closes
        elif fault.isdigit():
            said = f"no {self.headers['Authorization']}"  # a careless server repeats the key
            self._send(int(fault), json.dumps({"error": {"message": said}}))
        elif fault == "cut":
            self._send(200, whole, sent=len(whole) // 2)
        else:
            wrong = {"broken": whole[: len(whole) // 2], "html": "<html>", "empty": '{"choices": []}'}
            if not fault:
                with self.server.lock:
                    self.server.answered[text] += 1
            self._send(200, wrong.get(fault, whole))

    def _send(self, status: int, text: str, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", str(RETRY_AFTER_S))
        self.end_headers()
        self.wfile.write(text[:sent].encode())
        self.close_connection = True


@contextmanager
def serve(answer: Answer, faults: Faults = lambda text, tries: "") -> Iterator[FakeServer]:
    with FakeServer(answer, faults) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def serve_vllm(model: Path, log_file: Path) -> Iterator[tuple[str, int]]:
    """Its URL and its process group, once it is ready; the model's name is the folder's path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--model {model} --host 127.0.0.1 --port {port} --dtype float32 --seed 0 --block-size 32".split()
    words += ["--enforce-eager", "--no-enable-chunked-prefill"]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            env=os.environ | environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except (URLError, OSError):
                sleep(0.5)
        assert process.poll() is None, log_file.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1", process.pid
    finally:
        with suppress(ProcessLookupError):  # the test killed it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
