"""The repositories and uploaded objects of a model hub, and what each request does to them.

Only what a commit names becomes visible; uploaded objects alone are not.
"""

import base64
import fnmatch
import hashlib
import json
import time
from dataclasses import dataclass

import hub_xet

WRITER, READER = "hf_mayWriteEverything", "hf_mayOnlyRead"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    lfs: set[str]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit]
    branches: dict[str, str]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **payload) -> None:
        self.status, self.message, self.code, self.payload = status, message, code, payload


class HubStore:
    """One method for each route, called with the groups of its path; it returns a payload, or headers and payload."""

    url = ""
    part_size: float = float("inf")  # objects larger than this are uploaded in parts
    verifies = True  # offer the step in which an uploaded object is checked

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by the sha256 under which they were announced
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet = hub_xet.XetStore()

    # ---- repositories ----

    def _whoami(self, *, body):
        return {"name": "someone", "type": "user", "orgs": [{"name": "org"}]}

    def _create(self, *, body):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if name in self.repos:
            raise Refusal(409, f"You already created this model repo: {name}", url=f"{self.url}/{name}")
        repo = self.repos[name] = Repo(wanted.get("private") or wanted.get("visibility") == "private", {}, {})
        self._add_commit(repo, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, set())
        return {"url": f"{self.url}/{name}", "name": name, "id": "0"}

    def _branch(self, name, branch, *, body):
        repo = self._repo(name)
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def _info(self, name, revision="main", *, body):
        repo, commit = self._repo(name), self._commit_at(name, revision)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in commit.files.items()]
        return {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings}

    _info_at = _info

    def _tree(self, name, revision, folder="", *, body):
        commit = self._commit_at(name, revision)
        entries = []
        for path, data in commit.files.items():
            if folder and not path.startswith(folder + "/"):
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path in commit.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            raise Refusal(404, "Not found", "EntryNotFound")
        return entries

    def _resolve(self, name, revision, path, *, body):
        commit = self._commit_at(name, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        etag = hashlib.sha256(data).hexdigest() if path in commit.lfs else git_hash(data)
        return {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"'}, data

    def _repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def _commit_at(self, name: str, revision: str) -> Commit:
        commit = self._repo(name).at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- uploads ----

    def _validate(self, *, body):
        metadata = json.loads(body)["content"].split("---")[1]
        if "license: not-a-licence" in metadata:
            raise Refusal(400, '"license" must be one of [apache-2.0, mit]')
        return {"errors": [], "warnings": []}

    def _preupload(self, name, revision, *, body):
        commit = self._commit_at(name, revision)
        ignored = commit.files.get(".gitignore", b"").decode().split()
        answers = []
        for file in json.loads(body)["files"]:
            path, oid = file["path"], None
            is_lfs = path.endswith(".safetensors") or file["size"] > 10_000_000
            if path in commit.files:
                data = commit.files[path]
                oid = hashlib.sha256(data).hexdigest() if path in commit.lfs else git_hash(data)
            should_ignore = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": should_ignore, "oid": oid})
        return {"files": answers}

    def _batch(self, name, *, body):
        self._repo(name)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload = {"href": f"{self.url}/lfs/object/{oid}"}
                if size > self.part_size:
                    numbers = range(1, -(-size // self.part_size) + 1)
                    parts = {str(number): f"{self.url}/lfs/part/{oid}/{number}" for number in numbers}
                    upload = {"href": f"{self.url}/lfs/complete/{oid}", "header": {"chunk_size": str(self.part_size)}}
                    upload["header"] |= parts
                entry["actions"] = {"upload": upload}
                if self.verifies:
                    entry["actions"]["verify"] = {"href": f"{self.url}/lfs/verify/{oid}"}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _object(self, oid, *, body):
        self.objects[oid] = body
        return {}

    def _part(self, oid, number, *, body):
        self.parts.setdefault(oid, {})[int(number)] = body
        return {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, {}

    def _complete(self, oid, *, body):
        parts = self.parts.pop(oid, {})
        told = {part["partNumber"]: part["etag"].strip('"') for part in json.loads(body)["parts"]}
        if told != {number: hashlib.md5(data).hexdigest() for number, data in parts.items()}:
            raise Refusal(400, "InvalidPart")
        self.objects[oid] = b"".join(parts[number] for number in sorted(parts))
        return {}

    def _verify(self, oid, *, body):
        data = self.objects.get(oid, b"")
        if (hashlib.sha256(data).hexdigest(), len(data)) != (oid, json.loads(body)["size"]):
            self.objects.pop(oid, None)
            raise Refusal(422, "The uploaded object is not what was announced.")
        return {}

    def _xet_token(self, name, revision, *, body):
        self._commit_at(name, revision)
        return {"accessToken": WRITER, "exp": int(time.time()) + 3600, "casUrl": self.url}

    def _xorb(self, xorb_hash, *, body):
        self.xet.add_xorb(xorb_hash, body)
        return {"was_inserted": True}

    def _shard(self, *, body):
        try:
            self.objects |= self.xet.files_of_shard(body)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        return {"result": 1}

    def _commit(self, name, revision, *, body):
        repo, parent = self._repo(name), self._commit_at(name, revision)
        files, lfs, header = dict(parent.files), set(parent.lfs), {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
                continue
            files.pop(value["path"], None)
            lfs.discard(value["path"])
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.objects[value["oid"]]
                lfs.add(value["path"])
            else:
                assert entry["key"] == "deletedFile"
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        commit = self._add_commit(repo, revision, header["summary"], files, lfs)
        return {"commitUrl": f"{self.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid}

    def _add_commit(self, repo: Repo, branch: str, message: str, files: dict, lfs: set) -> Commit:
        oid = hashlib.sha1(f"{branch} {message} {len(repo.commits)}".encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, message, files, lfs)
        repo.branches[branch] = oid
        return commit
