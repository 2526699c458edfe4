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


class Hub(ThreadingHTTPServer):
    """Repositories with their files, and the requests that were made."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.private, self.objects, self.requests = {}, {}, {}, []


class Handler(BaseHTTPRequestHandler):
    """One request of the client."""

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
        self.server.requests.append(("GET", self.path))
        if repo not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"})
        return self.answer(200, {"id": repo, "private": self.server.private[repo], "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        data = self.body()
        self.server.requests.append(("PUT", self.path))
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, {})

    def do_POST(self):
        body = self.body()
        self.server.requests.append(("POST", self.path))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [(path, "lfs" if path.endswith(".safetensors") else "regular") for path in paths]
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            upload = {"actions": {"upload": {"href": f"{self.server.url}/s3"}}}
            objects = [one | upload for one in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self.commit(match[1], body)
        return self.answer(404, {"error": f"the stand-in has no {self.path}"})

    def create(self, requested):
        repo = f"{requested.get('organization') or 'me'}/{requested['name']}"
        url = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.server.repos[repo] = {}
        self.server.private[repo] = requested.get("private") is True or requested.get("visibility") == "private"
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
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.objects[value["oid"]]
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})


@contextmanager
def serve():
    """Run a stand-in on a free port."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
