"""
A small Hub on 127.0.0.1, over real HTTP: enough of its interface for `huggingface_hub` and `datasets` to work.

Repositories with revisions, regular and LFS uploads, commits, file listings and downloads, collections; and faults on
request. It keeps everything in memory.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_FROM = 4096  # bytes; smaller text files are regular
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, str]
    """Path to object id."""


@dataclass
class Repo:
    repo_type: str
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self) -> list[Commit]:
        """Without the commit that the repository starts with."""
        return list(self.commits.values())[1:]


@dataclass
class Fault:
    """What to answer instead, to requests whose method and path match."""

    method: str
    part_of_path: str
    status: int
    times: int
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close the connection after reading so many bytes of the body."""
    is_done: bool = False
    page: bytes | None = None
    """What is answered instead of JSON."""


class HubServer:
    """The server's state, and what tests ask it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.lfs_ids: set[str] = set()
        self.collections: dict[str, dict[str, Any]] = {}
        self.tokens = {"hf_write": ("me", "write"), "hf_read": ("me", "read")}
        self.organizations = ["my-team"]
        self.strangers = ["nobody"]
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []

    def fail(
        self,
        method: str,
        part_of_path: str,
        status: int = 500,
        times: int = 1,
        cut_after: int | None = None,
        is_done: bool = False,
        page: bytes | None = None,
        **headers: str,
    ) -> None:
        """Answer the next requests to a path by an error, after all is done or before, or cut their connection."""
        self.faults.append(Fault(method, part_of_path, status, times, headers, cut_after, is_done, page))

    def repo(self, repo_type: str, repo_id: str) -> Repo:
        return self.repos[repo_type, repo_id]

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision."""
        commit = self.repo(repo_type, repo_id).resolve(revision)
        assert commit is not None
        return {path: self.objects[oid] for path, oid in commit.files.items()}

    def create(self, repo_type: str, repo_id: str, private: bool = False) -> Repo:
        repo = Repo(repo_type, repo_id, private)
        self.repos[repo_type, repo_id] = repo
        self.commit(repo, "main", {}, "initial commit")
        return repo

    def commit(self, repo: Repo, branch: str, files: dict[str, str], message: str) -> Commit:
        sha = hashlib.sha1(f"{repo.repo_id}{len(repo.commits)}{sorted(files.items())}{message}".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, message, files)
        repo.branches[branch] = sha
        return repo.commits[sha]

    def store(self, content: bytes, lfs: bool) -> str:
        if lfs:
            oid = hashlib.sha256(content).hexdigest()
            self.lfs_ids.add(oid)
        else:
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.objects[oid] = content
        return oid


class _HTTPError(Exception):
    def __init__(self, status: int, message: str = "", code: str = "", body: dict[str, Any] | None = None):
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    # ---- Plumbing ----
    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.route = unquote(split.path)
        self.query = parse_qs(split.query)
        fault = None
        with self.hub.lock:
            self.hub.requests.append((self.command, self.route))
            for candidate in self.hub.faults:
                if candidate.times and candidate.method == self.command and candidate.part_of_path in self.route:
                    candidate.times -= 1
                    fault = candidate
                    break
        if fault is not None and fault.cut_after is not None:
            self.rfile.read(fault.cut_after)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body()
        if fault is not None and fault.is_done:
            with self.hub.lock:
                self._send = lambda *args: None  # type: ignore[method-assign]
                self._dispatch()
                del self._send
        if fault is not None:
            self._send(fault.status, fault.page or {"error": f"injected {fault.status}"}, fault.headers)
            return
        try:
            with self.hub.lock:
                self._dispatch()
        except _HTTPError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            if error.message:
                headers["X-Error-Message"] = error.message
            self._send(error.status, error.body or {"error": error.message}, headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_PATCH = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def _user(self, write: bool = False) -> tuple[str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.hub.tokens.get(token)
        if token and user is None:
            raise _HTTPError(401, "Invalid credentials in Authorization header")
        if write and user is None:
            raise _HTTPError(401, "Invalid username or password.")
        return user

    def _may_write(self, namespace: str) -> None:
        user = self._user(write=True)
        assert user is not None
        name, role = user
        if namespace not in (name, *self.hub.organizations, *self.hub.strangers):
            raise _HTTPError(404, f'The namespace "{namespace}" does not exist')
        if role != "write" or namespace not in (name, *self.hub.organizations):
            raise _HTTPError(
                403, f'You don\'t have the rights to create or change repositories under the namespace "{namespace}"'
            )

    def _find(self, repo_type: str, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and self._user() is None):
            raise _HTTPError(404 if self._user() else 401, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(repo_id.split("/")[0])
        return repo

    def _revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise _HTTPError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- Routes ----
    def _dispatch(self) -> None:
        parts = self.route.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
        elif self.route.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(self.route.removesuffix(".git/info/lfs/objects/batch").strip("/"))
        elif parts[0] == "lfs-upload":
            self._lfs_upload(parts[1])
        elif "resolve" in parts:
            self._download(parts)
        else:
            raise _HTTPError(404, f"No route {self.route}")

    def _api(self, parts: list[str]) -> None:
        if parts == ["whoami-v2"]:
            user = self._user(write=True)
            assert user is not None
            name, role = user
            organizations = [{"name": name, "type": "org"} for name in self.hub.organizations]
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            self._send(200, {"type": "user", "name": name, "orgs": organizations, "auth": auth})
        elif parts == ["repos", "create"]:
            self._create_repo(self._json())
        elif parts == ["validate-yaml"]:
            wrong = re.findall(r"^license: (.*[A-Z].*)$", self._json()["content"], re.MULTILINE)
            errors = [{"message": f'"license" is {license}'} for license in wrong]
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        elif parts[0] == "collections":
            self._collections(parts[1:])
        elif parts[0] in TYPES and len(parts) >= 3:
            self._repo_api(TYPES[parts[0]], f"{parts[1]}/{parts[2]}", parts[3:])
        else:
            raise _HTTPError(404, f"No route {self.route}")

    def _create_repo(self, options: dict[str, Any]) -> None:
        user = self._user(write=True)
        assert user is not None
        namespace = options.get("organization") or user[0]
        self._may_write(namespace)
        repo_type, repo_id = options.get("type", "model"), f"{namespace}/{options['name']}"
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[repo_type]
        url = f"{self.hub.url}/{prefix}{repo_id}"
        if (repo_type, repo_id) in self.hub.repos:
            raise _HTTPError(
                409,
                body={"error": f"You already created this {repo_type} repo: {repo_id}", "url": url, "name": repo_id},
            )
        private = options.get("private") or options.get("visibility") == "private"
        self.hub.create(repo_type, repo_id, bool(private))
        self._send(200, {"url": url, "name": repo_id, "id": repo_id})

    def _repo_api(self, repo_type: str, repo_id: str, rest: list[str]) -> None:
        if not rest or rest[0] == "revision":
            repo = self._find(repo_type, repo_id)
            commit = self._revision(repo, "/".join(rest[1:]) or "main")
            siblings = [{"rfilename": path, "size": len(self.hub.objects[oid])} for path, oid in commit.files.items()]
            info = {"id": repo_id, "sha": commit.sha, "siblings": siblings, "private": repo.private, "tags": []}
            self._send(200, {**info, "downloads": 0, "likes": 0, "disabled": False, "gated": False})
        elif rest[0] == "preupload":
            self._preupload(self._find(repo_type, repo_id, write=True), "/".join(rest[1:]))
        elif rest[0] == "commit":
            self._commit(self._find(repo_type, repo_id, write=True), "/".join(rest[1:]))
        elif rest[0] == "branch":
            repo = self._find(repo_type, repo_id, write=True)
            branch = "/".join(rest[1:])
            if branch.startswith("refs/"):
                raise _HTTPError(400, f"Invalid branch name: {branch}")
            if branch in repo.branches:
                raise _HTTPError(409, "Reference already exists")
            repo.branches[branch] = self._revision(repo, self._json().get("startingPoint") or "main").sha
            self._send(200, {})
        elif rest[0] == "refs":
            repo = self._find(repo_type, repo_id)
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
            ]
            self._send(200, {"branches": branches, "converts": [], "tags": []})
        elif rest[0] == "tree":
            self._tree(self._find(repo_type, repo_id), rest[1], "/".join(rest[2:]))
        elif rest[0] == "paths-info":
            repo = self._find(repo_type, repo_id)
            commit = self._revision(repo, "/".join(rest[1:]))
            wanted = parse_qs(self.body.decode()) if b"=" in self.body else self._json()
            self._send(200, [entry for path in wanted.get("paths", []) for entry in self._entries(commit, path, True)])
        else:
            raise _HTTPError(404, f"No route {self.route}")

    def _describe(self, path: str, oid: str) -> dict[str, Any]:
        size = len(self.hub.objects[oid])
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": oid}
        if oid in self.hub.lfs_ids:
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
        return entry

    def _entries(self, commit: Commit, path: str, itself: bool) -> list[dict[str, Any]]:
        path = path.strip("/")
        if itself and path in commit.files:
            return [self._describe(path, commit.files[path])]
        if itself and any(name.startswith(f"{path}/") for name in commit.files):
            return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}]
        return []

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        commit = self._revision(repo, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, oid in commit.files.items():
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix).split("/")
            for depth in range(1, len(inner)):
                if recursive or depth == 1:
                    parent = prefix + "/".join(inner[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(inner) == 1:
                entries[path] = self._describe(path, oid)
        if folder and not entries:
            raise _HTTPError(404, f"{folder} does not exist", "EntryNotFound")
        self._send(200, list(entries.values()))

    def _preupload(self, repo: Repo, revision: str) -> None:
        commit = self._revision(repo, revision)
        files = []
        for file in self._json()["files"]:
            sample = base64.b64decode(file["sample"])
            is_lfs = file["size"] >= LFS_FROM or b"\0" in sample or not _is_text(sample)
            info = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            files.append({**info, "oid": commit.files.get(file["path"])})
        self._send(200, {"files": files, "commitOid": commit.sha})

    def _lfs_batch(self, repo: str) -> None:
        repo_type, _, repo_id = repo.partition("/") if repo.startswith("datasets/") else ("models", "", repo)
        self._find(TYPES[repo_type], repo_id, write=True)
        objects = []
        for wanted in self._json()["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-upload/{wanted['oid']}"}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _HTTPError(400, "The content does not have this checksum")
        self.hub.store(self.body, lfs=True)
        self._send(200, {})

    def _commit(self, repo: Repo, branch: str) -> None:
        parent = self._revision(repo, branch)
        files = dict(parent.files)
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent.sha):
                    raise _HTTPError(412, "A commit has happened since.")
            elif operation["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _HTTPError(400, f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif operation["key"] == "deletedFolder":
                files = {path: oid for path, oid in files.items() if not path.startswith(value["path"])}
        commit = self.hub.commit(repo, branch, files, message)
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[repo.repo_type]
        url = f"{self.hub.url}/{prefix}{repo.repo_id}/commit/{commit.sha}"
        self._send(200, {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _download(self, parts: list[str]) -> None:
        at = parts.index("resolve")
        repo_type = TYPES.get(parts[0], "model")
        repo = self._find(repo_type, "/".join(parts[at - 2 : at]))
        commit = self._revision(repo, parts[at + 1])
        oid = commit.files.get("/".join(parts[at + 2 :]))
        if oid is None:
            raise _HTTPError(404, "Entry not found", "EntryNotFound")
        content = self.hub.objects[oid]
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if oid in self.hub.lfs_ids:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, content, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers)

    def _collections(self, rest: list[str]) -> None:
        if not rest and self.command == "POST":
            options = self._json()
            self._may_write(options["namespace"])
            slug = f"{options['namespace']}/{options['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
            if slug in self.hub.collections:
                raise _HTTPError(409, "It exists", body={"error": "It exists", "slug": slug})
            self.hub.collections[slug] = {
                "slug": slug, "title": options["title"], "owner": {"name": options["namespace"]}, "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z", "private": bool(options.get("private")), "theme": "blue",
                "upvotes": 0, "position": 0, "description": options.get("description"), "gating": False,
            }  # fmt: skip
            self._send(200, self.hub.collections[slug])
            return
        slug = "/".join(rest[:2])
        if slug not in self.hub.collections:
            raise _HTTPError(404, "Collection not found")
        collection = self.hub.collections[slug]
        if rest[2:] == ["items"] and self.command == "POST":
            item = self._json()["item"]
            if any(known["id"] == item["id"] and known["type"] == item["type"] for known in collection["items"]):
                raise _HTTPError(409, "It is there already")
            collection["items"].append(
                {**item, "_id": f"{len(collection['items']):024x}", "position": len(collection["items"])}
            )
        self._send(200, collection)


def _is_text(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start > len(sample) - 4  # a character cut in two
    return True


def start_hub() -> HubServer:
    """A server on a free port of 127.0.0.1, as long as the process lives."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub
