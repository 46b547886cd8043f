# SPDX-License-Identifier: Apache-2.0
"""A loopback server that speaks the part of OpenAI's protocol that rewards ask for."""

import json
import math
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackChat:
    """A loopback server. `answer(number, body)` gives the text of an answer, an HTTP status, or bytes to send as is."""

    def __init__(self, answer, served=("judge",)):
        self.requests, self.headers, lock = [], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def reply(self, status, data):
                self.send_response(status)
                if 300 < status < 400:
                    self.send_header("Location", outer.url + "/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                outer.headers.append(dict(self.headers))
                if served is None:
                    return self.reply(404, b"")
                self.reply(200, json.dumps({"data": [{"id": name} for name in served]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                result = answer(number, body)
                if isinstance(result, str):
                    result = json.dumps({"choices": [{"message": {"content": result}}]}).encode()
                try:
                    self.reply(*((result, b"no reason") if isinstance(result, int) else (200, result)))
                except OSError:  # the client did not wait
                    pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._server.shutdown()
        self._server.server_close()


def with_probabilities(tokens: Mapping[str, float]) -> bytes:
    """An answer with the probabilities of the tokens that it may begin with."""
    top = [{"token": token, "logprob": math.log(value)} for token, value in tokens.items()]
    first = {**top[0], "top_logprobs": top}
    choice = {"message": {"content": first["token"]}, "logprobs": {"content": [first]}}
    return json.dumps({"choices": [choice]}).encode()
