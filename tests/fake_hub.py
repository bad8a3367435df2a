"""A server on localhost that answers as the Hub does: enough of it to read datasets and models, and to create both.

Large files go the way of Git LFS: a batch request, an upload by PUT, and a commit that names their hash.

`HF_ENDPOINT` has to name it before huggingface_hub is imported, so what talks to it runs in a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`datasets` maps ids to `{path: bytes}`; `refuse` maps ids to `(status, X-Error-Code)`."""

    def __init__(self, datasets: dict[str, dict[str, bytes]], refuse: dict[str, tuple[int, str]] | None = None):
        self.datasets, self.refuse = datasets, refuse or {}
        self.forget()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def forget(self) -> None:
        """Have no models and no notes of requests, as at the start."""
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict] = []
        self.committed: dict[str, bytes] = {}  # by path, of all repositories
        self.models: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []  # repository, message
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/whoami-v2":
            return self.answer(body={"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        for kind, repos in (("datasets/", hub.datasets), ("", hub.models)):
            for name, files in repos.items():
                if self.answer_about(path, kind, name, files):
                    return None
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    def answer_about(self, path, kind, name, files):
        """Answer if the path is of this repository, and say whether."""
        hub, api = self.hub, f"/api/{kind or 'models/'}{name}"
        if not path.startswith((f"{api}/", f"/{kind}{name}/")) and path != api:
            return False
        if name in hub.refuse:
            status, code = hub.refuse[name]
            self.answer(status, {"error": "refused"}, X_Error_Code=code, X_Error_Message="refused")
            return True
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in files.items()
        ]
        if path in (api, f"{api}/revision/{SHA}", f"{api}/revision/main"):
            facts = {"_id": "1", "id": name, "sha": SHA, "private": False, "gated": False, "tags": [], "downloads": 0}
            siblings = [{"rfilename": file} for file in files]
            self.answer(body={**facts, "likes": 0, "siblings": siblings, "cardData": {"license": "mit"}})
        elif path.startswith(f"{api}/tree/{SHA}"):
            folder = path.removeprefix(f"{api}/tree/{SHA}").strip("/")
            found = _tree(entries, folder, "recursive=true" in urlsplit(self.path).query.lower())
            self.answer(body=found) if found else self.answer(404, {}, X_Error_Code="EntryNotFound")
        elif path.startswith(f"/{kind}{name}/resolve/{SHA}/"):
            self.answer_file(files.get(path.removeprefix(f"/{kind}{name}/resolve/{SHA}/")))
        else:
            return False
        return True

    def answer_file(self, content):
        if content is None:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        wanted = self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            return self.answer(206, content[int(first) : end], ETag=etag, X_Repo_Commit=SHA, Accept_Ranges="bytes",
                               Content_Range=f"bytes {first}-{end - 1}/{len(content)}")  # fmt: skip
        return self.answer(200, content, ETag=etag, X_Repo_Commit=SHA, Accept_Ranges="bytes")

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self):
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.objects[self.path.removeprefix("/lfs/")] = self.body()
        self.answer()

    def do_POST(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"POST {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.body()
        if path == "/api/validate-yaml":
            return self.answer(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            repo = json.loads(body)
            hub.created.append(repo)
            name = "/".join(filter(None, (repo.get("organization"), repo["name"])))
            if repo.get("type", "model") == "model":
                hub.models.setdefault(name, {})
                return self.answer(body={"url": f"{hub.url}/{name}", "name": name, "id": "1"})
            return self.answer(body={"url": f"{hub.url}/datasets/me/made", "name": "me/made", "id": "1"})
        if "/preupload/" in path:
            large = (".safetensors", ".bin", ".pt", ".pth") if path.startswith("/api/models/") else ()
            return self.answer(body={"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]]})  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**asked, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self.answer(body={"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").removeprefix("/api/datasets/").partition("/commit/")[0]
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    hub.commits.append((name, value["summary"]))
                    continue
                if operation["key"] == "lfsFile":
                    content = hub.objects.get(value["oid"], b"")
                    if hashlib.sha256(content).hexdigest() != value["oid"] or len(content) != value["size"]:
                        return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                else:
                    content = base64.b64decode(value["content"])
                hub.committed[value["path"]] = content
                if path.startswith("/api/models/"):
                    hub.models[name][value["path"]] = content
            return self.answer(
                body={"success": True, "commitOid": SHA, "commitUrl": f"{hub.url}/datasets/me/made/commit/{SHA}"}
            )
        for name, files in hub.datasets.items():
            if path == f"/api/datasets/{name}/paths-info/{SHA}":
                asked = body.decode()
                found = [{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                         for file, content in files.items() if file in unquote(asked)]  # fmt: skip
                return self.answer(body=found)
        self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")


def _tree(entries, folder, recursive):
    """Files and folders below `folder`."""
    prefix = f"{folder}/" if folder else ""
    inside = [entry for entry in entries if entry["path"].startswith(prefix)]
    parents = {prefix + "/".join(entry["path"].removeprefix(prefix).split("/")[:depth]) for entry in inside
               for depth in range(1, entry["path"].removeprefix(prefix).count("/") + 1)}  # fmt: skip
    folders = [{"type": "directory", "path": parent, "size": 0, "oid": "1"} for parent in sorted(parents)]
    return [entry for entry in inside + folders if recursive or "/" not in entry["path"].removeprefix(prefix)]
