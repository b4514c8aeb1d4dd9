"""A Hugging Face hub on this machine, as far as the client of huggingface_hub asks one to keep and give files."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The files of all repositories, what was asked, and headers with which every file is answered."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, status, data=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def say(self, value, status=200):
            self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

        def do_POST(self):
            path, data = unquote(urlsplit(self.path).path), self.body()
            hub.asked.append(f"POST {path}")
            if path == "/api/repos/create":
                said = json.loads(data)
                name = f"{said.get('organization') or 'user'}/{said['name']}"
                hub.files.setdefault(name, {})
                return self.say({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            if path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            name = "/".join(path.split("/")[3:5])
            if path.endswith("/preupload/main"):
                files = json.loads(data)["files"]
                return self.say(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            if path.endswith("/commit/main"):
                for line in data.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        hub.files[name][value["path"]] = base64.b64decode(value["content"])
                address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
                return self.say({"success": True, "commitOid": COMMIT, "commitUrl": address, "hookOutput": ""})
            return self.say({"error": f"no {path}"}, 404)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self.say({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []})
            data = hub.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if len(parts) < 5 or parts[2] != "resolve" or data is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(data).hexdigest()
            return self.answer(200, data, **{"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT, **hub.headers})

        do_HEAD = do_GET

    return Handler


@contextmanager
def running():
    """Yields the hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
