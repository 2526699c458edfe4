"""A server on 127.0.0.1 that answers wandb as its own does, or refuses, hangs, or fails; it keeps what runs log."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


class WandbServer:
    """Accepts runs of the key above.

    Attributes:
        mode: accept, deny (the key), fail (with status 500), hang, or garble (an answer that is no answer).
        history: Lines of history by run id, in the places that wandb gave them.
        asked: Set once anything was asked.
    """

    def __init__(self, mode: str = "accept") -> None:
        self.mode = mode
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.requested, self._closing = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wandb": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are killed
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Let go of those who wait, and refuse connections from now on."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def steps(self, run: str) -> list[int]:
        """Steps of a run's history, in the order of the lines."""
        lines = self.history.get(run, {})
        return [lines[at]["_step"] for at in sorted(lines)]

    def wait(self) -> None:
        """As one who never answers."""
        self._closing.wait()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Data of a GraphQL answer."""
        project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "e"}}
        if "upsertBucket" in query:
            name = variables.get("name") or variables.get("id")
            bucket = {"id": "aWQ=", "name": name, "displayName": name, "config": "{}", "project": project}
            inserted = name not in self.history
            self.history.setdefault(name, {})
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": inserted}}
        if "RunResumeStatus" in query:
            return {"model": project | {"bucket": self._bucket(variables["name"])}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "dg==", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        """The history that a resumed run gets of its earlier parts."""
        lines = self.history.get(name)
        if lines is None:
            return None
        last = json.dumps([json.dumps(lines[max(lines)])] if lines else [])
        return {
            "id": "aWQ=", "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}", "tags": [],
            "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0,
            "historyTail": last, "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Store lines of history at their offsets."""
        chunk = files.get("wandb-history.jsonl")
        if chunk:
            lines = [json.loads(line) for line in chunk["content"]]
            self.history.setdefault(run, {}).update(enumerate(lines, chunk["offset"]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode = self.wandb.mode
        self.wandb.requested.set()
        if mode == "hang":
            self.wandb.wait()
        elif mode == "accept":
            self._answer(200, self._accept(body))
        else:
            code = {"deny": 401, "fail": 500, "garble": 200}[mode]
            self._answer(code, {"data": {"model": 3}} if mode == "garble" else {"errors": [{"message": "no"}]})

    do_GET = do_PUT = do_POST

    def _accept(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            return {"data": self.wandb.answer(request["query"], request.get("variables") or {})}
        if self.path.endswith("/file_stream"):
            self.wandb.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
        return {}

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
