"""The Hugging Face hub in a thread, as far as huggingface_hub uses it to send and fetch models.

Files of LFS_BYTES or more go through LFS: batch, PUT, verify, and a redirect to a content host when fetched. Everything
is in memory. `changes` lists the requests that would change anything on a real hub.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_" + "testtoken" * 3
LFS_BYTES = 20_000
CHUNK = 4096


@dataclass
class Repository:
    """Commits by id, each a dictionary of names and contents; `main` is the newest."""

    private: bool
    commits: dict = field(default_factory=dict)
    main: str = ""

    def add_commit(self, files):
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + self.main.encode()).hexdigest()
        self.commits[digest], self.main = dict(files), digest
        return digest

    def files(self, revision):
        return self.commits.get(self.main if revision == "main" else revision)


class FakeHub:
    """A hub at `url`. Use it as a context manager."""

    def __init__(self):
        self.repositories, self.lfs, self.requests = {}, {}, []
        self.refuse = {}  # (method, start of the path): status code
        self.stall_after = None  # bytes of an LFS file after which fetching stops until `release`
        self.stalled, self.release = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.content_url = f"http://localhost:{self.server.server_port}/content"  # another host, as on the real hub

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def changes(self):
        return [(method, path) for method, path, _ in self.requests if method not in ("GET", "HEAD")]

    def add(self, name, files, private=False):
        """Add a commit to a repository, which is made if it is missing."""
        repository = self.repositories.setdefault(name, Repository(private))
        for content in files.values():
            self.lfs[hashlib.sha256(content).hexdigest()] = content
        return repository.add_commit(files)


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        self.path, _, self.query = self.path.partition("?")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self.read_chunks()
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        for (method, start), status in self.hub.refuse.items():
            if self.command == method and self.path.startswith(start):
                return self.answer(status, {"error": "refused by the test"})
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, self.path)
            if found and self.command in method:
                return handle(self, *found.groups())
        self.answer(404, {"error": f"the fake hub has no {self.command} {self.path}"})

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle(self):
        with suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def answer(self, status, content=None, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def json(self):
        return json.loads(self.body)

    def may_write(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid credentials in Authorization header"})
        return False

    def repository(self, name):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def create(self):
        if not self.may_write():
            return
        name = f"{self.json['organization']}/{self.json['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(self.json.get("visibility") == "private")
        self.hub.repositories[name].add_commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, name, revision="main"):
        repository = self.repository(name)
        if repository is None:
            return
        files = repository.files(revision)
        if files is None:
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        commit = repository.main if revision == "main" else revision
        siblings = [
            {"rfilename": file, **(facts(content) if "blobs" in self.query else {})} for file, content in files.items()
        ]
        self.answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, name, revision):
        files = self.repository(name).files(revision)
        entries = []
        for file, content in files.items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": blob_id(content)}
            if len(content) >= LFS_BYTES:
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(200, entries)

    def validate(self):
        found = re.match(r"---\n(.*?)\n---\n", self.json["content"], re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name, revision):
        if not self.may_write():
            return
        present = self.repository(name).files(revision) or {}
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                "shouldIgnore": False,
                "oid": blob_id(present[file["path"]]) if file["path"] in present else None,
            }
            for file in self.json["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, name):
        objects = []
        for wanted in self.json["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                actions = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
                entry["actions"] = actions | {"verify": {"href": f"{self.hub.url}/lfs_verify"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if sha256(self.body) != oid:
            return self.answer(400, {"error": "content does not match"})
        self.hub.lfs[oid] = self.body
        self.answer(200, b"")

    def verify(self):
        known = self.hub.lfs.get(self.json["oid"])
        self.answer(200 if known is not None and len(known) == self.json["size"] else 404, {})

    def commit(self, name, revision):
        if not self.may_write():
            return
        repository = self.repository(name)
        files = dict(repository.files(revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        commit = repository.add_commit(files)
        self.answer(200, {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, name, revision, file):
        content = (self.repository(name).files(revision) or {}).get(file)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": revision, "ETag": f'"{blob_id(content)}"'}
        if len(content) < LFS_BYTES:
            return self.answer(200, content, headers)
        headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": len(content)}
        self.answer(302, b"", headers | {"Location": f"{self.hub.content_url}/{sha256(content)}"})

    def content(self, oid):
        content = self.hub.lfs[oid]
        start = int(re.search(r"\d+", self.headers.get("Range") or "0")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        for place in range(start, len(content), CHUNK):
            if self.hub.stall_after is not None and place >= self.hub.stall_after:
                self.hub.stalled.set()
                self.hub.release.wait(60)
            self.wfile.write(content[place : place + CHUNK])


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def facts(content):
    entry = {"size": len(content), "blobId": blob_id(content)}
    if len(content) >= LFS_BYTES:
        entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/models/{NAME}", _Handler.info),
    (("GET",), f"/api/models/{NAME}/revision/([^/]+)", _Handler.info),
    (("GET",), f"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    (("POST",), f"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    (("POST",), f"/{NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _Handler.upload),
    (("POST",), "/lfs_verify", _Handler.verify),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("GET", "HEAD"), "/content/([0-9a-f]{64})", _Handler.content),
]
