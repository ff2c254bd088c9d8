"""Serves an exported model over HTTP: a history in, items out. PyTorch, NumPy and safetensors are all it needs.

    python examples/serve.py MODEL PORT
    curl 'http://127.0.0.1:PORT/?domain=books&k=5&item=1764146000:books:B000FA5SXY&item=1764147000:video:B00005JKZ2'

An item is TIME:DOMAIN:ID; TIME is a date or a number in the logs' unit. This is an example of the calls, not a server for the public.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from trainer.serving.example import Recommender, read_event


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests."""

    recommender: Recommender

    def do_GET(self) -> None:
        """?domain=…&k=…&item=TIME:DOMAIN:ID, repeated."""
        query = parse_qs(urlsplit(self.path).query)
        try:
            domain = query["domain"][0]
            k = int(query.get("k", ["10"])[0])
            domains = list(self.recommender.domains)
            history = []
            for text in query.get("item", []):
                history.append(
                    read_event(text, self.recommender.schema, domains)
                )
            items = self.recommender(history, domain, k)
            self._answer(
                200, [{"item": item, "score": score} for item, score in items]
            )
        except (KeyError, ValueError, IndexError) as error:
            self._answer(400, {"error": str(error)})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(model: str, port: str) -> None:
    """Loads the model once, then answers until it is stopped."""
    Handler.recommender = Recommender(Path(model))
    with ThreadingHTTPServer(("127.0.0.1", int(port)), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
