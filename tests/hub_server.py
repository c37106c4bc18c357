"""A server in this process that takes pushes as the Hugging Face hub does, into a folder."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class HubServer(ThreadingHTTPServer):
    """Knows one repository, `owner/name`; commits land in `folder`. All files are small ones."""

    daemon_threads = True
    TOKEN: ClassVar = "hf_local"

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.created: list[dict] = []
        self.commits: list[dict] = []
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.answer(404, {"error": "not here"})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.headers["Authorization"] != f"Bearer {self.server.TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(data))
            self.answer(200, {"url": f"{self.server.url}/owner/name", "id": "owner/name"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.startswith("/api/models/owner/name/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(data)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.startswith("/api/models/owner/name/commit/"):
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.commits.append(entry["value"])
                else:
                    file = self.server.folder / entry["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            place = f"{self.server.url}/owner/name/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": place, "commitOid": "0" * 40, "success": True})
        else:
            self.answer(404, {"error": "not here"})

    def answer(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
