"""A Hub small enough to read, on loopback: what the real client asks for to make, fill and read model repositories."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, STRANGER = "hf_writer0123456789", "hf_reader0123456789", "hf_stranger0123456789"
USERS = {WRITER: ("ada", "write"), READER: ("ada", "read"), STRANGER: ("bob", "write")}
LARGE = (".safetensors", ".bin", ".png")


@dataclass
class Repo:
    private: bool
    branches: dict = field(default_factory=dict)  # name -> commit
    commits: dict = field(default_factory=dict)  # commit -> {path: content}
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        sha = hashlib.sha1(f"{branch}{message}{time.time_ns()}".encode()).hexdigest()
        self.branches[branch], self.commits[sha] = sha, files
        self.messages.append(message)
        return sha

    def files(self, revision="main"):
        """Files at a branch or commit; None if there is no such revision."""
        return self.commits.get(self.branches.get(revision, revision))


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, code=None, headers=None, body=None):
        self.status, self.body = status, {"error": message} | (body or {})
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


class Hub:
    """The server: `repos` by id, `seen` requests, and faults."""

    def __init__(self):
        self.repos, self.blobs, self.seen, self.faults = {}, {}, [], []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method, path, status, times=1, **headers):
        """Answer the next requests that match with a status, or with a closed connection if it is None."""
        self.faults.append([method, re.compile(path), status, times, headers])

    def add(self, repo_id, files, branch="main", private=False):
        """Put files into a repository without a client."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        return repo.commit(branch, dict(repo.files(branch) or {}) | files, "by hand")

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _handle(self):
        hub = self.hub
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.role = USERS.get(token, (None, None))
        with hub.lock:
            hub.seen.append((self.command, path, token))
            fault = next((f for f in hub.faults if f[0] == self.command and f[1].search(path) and f[3] > 0), None)
            if fault is not None:
                fault[3] -= 1
        try:
            if fault is not None:
                if fault[2] is None:
                    self.close_connection = True
                    return self.connection.close()
                raise RefusedError(fault[2], f"as the test wants, to {token}", headers=fault[4])
            if token and self.user is None:
                raise RefusedError(401, "Invalid credentials in Authorization header")
            for pattern, function in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    with hub.lock:
                        return self._answer(200, function(self, **found.groupdict()))
            raise RefusedError(404, f"no route {self.command} {path}")
        except RefusedError as refused:
            return self._answer(refused.status, refused.body, refused.headers)

    def _answer(self, status, content, headers=None):
        if isinstance(content, tuple):
            content, headers = content
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value).replace("\n", " "))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

    # ---- what is asked ----

    def repo(self, repo_id, write=False):
        found = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if found is None or (found.private and self.user != owner):
            raise RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and (self.user != owner or self.role != "write"):
            raise RefusedError(403, "You have no right to write here")
        return found

    def files_at(self, repo, revision):
        files = repo.files(revision)
        if files is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return files

    def whoami(self):
        if self.user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": self.role}}}

    def create(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.role != "write" or repo_id.split("/")[0] != self.user:
            raise RefusedError(403, f"You don't have the rights to create a model under {repo_id.split('/')[0]}")
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", body=url)
        self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private")
        self.hub.repos[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        return url

    def validate(self):
        head = json.loads(self.body)["content"].split("---\n")
        if len(head) < 3:
            raise RefusedError(400, "no metadata", body={"errors": [{"message": "no metadata"}]})
        return {"warnings": [], "errors": []}

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        files = self.files_at(repo, revision)
        sha = repo.branches.get(revision, revision)
        siblings = [{"rfilename": name} for name in files]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "private": repo.private,
            "sha": sha,
            "siblings": siblings,
            "tags": [],
        }

    def preupload(self, repo_id, revision):
        files = self.files_at(self.repo(repo_id, write=True), revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            large = asked["path"].endswith(LARGE)
            answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if asked["path"] in files:
                answer["oid"] = _oid(asked["path"], files[asked["path"]])
            answers.append(answer)
        return {"files": answers}

    def batch(self, repo_id):
        self.repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{asked['oid']}"
            new = {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.blobs else new))
        return {"transfer": "basic", "objects": objects}

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "content is not what its name says")
        self.hub.blobs[oid] = self.body
        return b""

    def verify(self, oid):
        if len(self.hub.blobs.get(oid, b"")) != json.loads(self.body)["size"]:
            raise RefusedError(400, "not uploaded")
        return {}

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(self.files_at(repo, revision))
        parent = header.get("parentCommit")
        if parent and parent != repo.branches.get(revision):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] not in self.hub.blobs:
                raise RefusedError(400, f"{value['path']} was not uploaded")
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
        branch = "refs/pr/1" if "create_pr" in self.query else revision
        sha = repo.commit(branch, files, header["summary"])
        pull = f"{self.hub.url}/{repo_id}/discussions/1"
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": pull}

    def tree(self, repo_id, revision):
        entries = []
        for name, content in self.files_at(self.repo(repo_id), revision).items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _oid("", content)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def resolve(self, repo_id, revision, name):
        repo = self.repo(repo_id)
        files = self.files_at(repo, revision)
        headers = {"X-Repo-Commit": repo.branches.get(revision, revision)}
        if name not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        return files[name], headers | {"ETag": f'"{_oid(name, files[name])}"'}


for method in ("GET", "POST", "PUT", "HEAD", "DELETE"):
    setattr(_Handler, f"do_{method}", _Handler._handle)


def _oid(name, content):
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"(?P<repo_id>[^/]+/[^/]+?)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"/api/models/{_ID}", _Handler.info),
    (rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/(?P<oid>\w+)/verify", _Handler.verify),
    (r"/lfs/(?P<oid>\w+)", _Handler.put),
    (rf"/{_ID}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<name>.+)", _Handler.resolve),
]
