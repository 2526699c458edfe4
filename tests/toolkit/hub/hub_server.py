"""A stand-in for the hub: the endpoints that huggingface_hub's client calls to create a repository and commit to it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "stand-in"


class Hub:
    """Repositories with their files, and the requests that were made."""

    def __init__(self):
        self.url = ""
        self.repos, self.private, self.objects, self.requests = {}, {}, {}, []


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def do_GET(self):
            repo = self.path.removeprefix("/api/models/").split("?")[0]
            hub.requests.append(("GET", self.path))
            if repo not in hub.repos:
                return self.answer(404, {"error": "Repository not found"})
            return self.answer(200, {"id": repo, "private": hub.private[repo], "sha": "0" * 40, "siblings": []})

        def do_PUT(self):
            data = self.body()
            hub.requests.append(("PUT", self.path))
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            self.answer(200, {})

        def do_POST(self):
            body = self.body()
            hub.requests.append(("POST", self.path))
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            if self.path == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
                files = json.loads(body)["files"]
                modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
                return self.answer(
                    200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
                )
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                return self.answer(
                    200,
                    {
                        "transfer": "basic",
                        "objects": [one | {"actions": {"upload": {"href": f"{hub.url}/s3"}}} for one in objects],
                    },
                )
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                return self.commit(match[1], body)
            return self.answer(404, {"error": f"the stand-in has no {self.path}"})

        def create(self, requested):
            repo = f"{requested.get('organization') or 'me'}/{requested['name']}"
            url = {"url": f"{hub.url}/{repo}"}
            if repo in hub.repos:
                return self.answer(409, {"error": "You already created this model repo", **url})
            hub.repos[repo] = {}
            hub.private[repo] = requested.get("private") is True or requested.get("visibility") == "private"
            return self.answer(200, url)

        def validate(self, content):
            head = yaml.safe_load(content.split("---")[1])
            if "language" in head and len(str(head["language"])) > 3:
                return self.answer(400, {"errors": [{"message": '"language" is not valid'}], "warnings": []})
            return self.answer(200, {"errors": [], "warnings": []})

        def commit(self, repo, body):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[repo][value["path"]] = hub.objects[value["oid"]]
            return self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40})

    return Handler


@contextmanager
def serve():
    """Run a stand-in on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
