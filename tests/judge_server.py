"""An OpenAI-compatible server in this process that answers as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Keeps the requests; `say` maps the number of a request to (status, answer)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say = lambda number: (200, '{"score": 7, "reason": "nearly"}')
        self.whole = lambda number: None  # or (content type, body) of the reply
        self.requests = []
        self.keys = []
        self.under_way = self.most_under_way = 0
        self.pause = 0.0
        self.together = 1  # requests that must have been under way at once before one is answered
        self.lock = threading.Condition()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            number = len(self.server.requests)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            self.server.lock.notify_all()
            self.server.lock.wait_for(
                lambda: self.server.most_under_way >= self.server.together, timeout=15
            )
        time.sleep(self.server.pause)
        status, text = self.server.say(number)
        with self.server.lock:
            self.server.under_way -= 1
        if status == 200:
            reply = {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050},
            }  # fmt: skip
        else:
            reply = {"error": {"message": text}}
        whole = self.server.whole(number)
        kind, data = whole or ("application/json", json.dumps(reply).encode())
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass
