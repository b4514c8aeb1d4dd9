"""A server on this machine that speaks OpenAI's protocol as far as a judge is asked by it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """What was asked, and the function that answers."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []


def handler(server):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(said)
            (answer,) = server.answer([said["messages"][0]["content"]])
            if isinstance(answer, Exception):
                return self.send_error(500, str(answer))
            message = {"role": "assistant", "content": answer}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            data = {"id": "1", "object": "chat.completion", "created": 0, "model": said["model"], "choices": choices}
            data = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def running(answer):
    """Yields the server, and its address."""
    server = Server(answer)
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{web.server_address[1]}/v1"
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
