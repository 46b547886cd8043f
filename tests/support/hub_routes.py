# SPDX-License-Identifier: Apache-2.0
"""The addresses that `hub_server.py` answers."""

import base64
import hashlib
import json
import re
import secrets
from urllib.parse import parse_qs

import yaml

from tests.support.hub_cards import front_matter, validate_card
from tests.support.hub_handler import BaseHandler, HubError, route
from tests.support.hub_store import LFS_SUFFIXES, Repo, is_lfs


REPO = r"/api/(?P<type>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<type>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"

SPACE_README = """---
title: {name}
emoji: 🚀
colorFrom: red
colorTo: blue
sdk: {sdk}
pinned: false
---
"""


class Handler(BaseHandler):
    """Answers for the repositories of a [`HubServer`]."""

    # Users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.user.role == "fineGrained":
            scoped = [
                {"entity": {"type": "user" if name == self.user.name else "org", "name": name}, "permissions": list(p)}
                for name, p in self.user.scopes.items()
            ]
            token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": r} for name, r in self.user.orgs.items()]
        return {
            "type": "user",
            "id": hashlib.sha1(self.user.name.encode()).hexdigest()[:24],
            "name": self.user.name,
            "fullname": self.user.name,
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = asked.get("organization") or self.user.name
        repo_type = asked.get("type") or "model"
        self.check_write(
            namespace, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
        )
        repo = Repo(f"{namespace}/{asked['name']}", repo_type, asked.get("visibility") == "private", False)
        url = f"{self.hub.endpoint}/{repo.url_path}"
        if (repo_type, repo.repo_id) in self.hub.store.repos:
            error = HubError(409, f"You already created this {repo_type} repo")
            error.body["url"] = url
            raise error
        repo.sdk = asked.get("sdk")
        self.hub.store.add_repo(repo)
        lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": self.hub.store.entry(lines.encode(), lfs=False)}
        if repo_type == "space":
            readme = SPACE_README.format(name=asked["name"], sdk=repo.sdk)
            files["README.md"] = self.hub.store.entry(readme.encode(), lfs=False)
        self.hub.store.commit(repo, "main", files, "initial commit", author=self.user.name)
        return {"url": url, "name": repo.repo_id, "id": secrets.token_hex(12)}

    @route("GET", REPO + "/auth-check(?P<write>/write)?")
    def auth_check(self, repo, write):
        self.check_gate(repo)
        if write:
            self.check_write(repo.namespace)
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        asked = json.loads(self.body)
        errors, warnings = validate_card(asked["content"], asked.get("repoType") or "model")
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            error = HubError(400, "; ".join(errors))
            error.body |= answer
            raise error
        return answer

    @route("GET", REPO + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, repo, revision):
        commit = self.commit_of(repo, revision or "main")
        files, history = repo.commits[commit]["files"], repo.history(commit)
        card = None
        if "README.md" in files:
            text = self.hub.store.blob(files["README.md"]["sha256"]).read_text(encoding="utf-8")
            card = yaml.safe_load(front_matter(text) or "")
        card = card or {}
        return {
            "_id": hashlib.sha1(repo.url_path.encode()).hexdigest()[:24],
            "id": repo.repo_id,
            "author": repo.namespace,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "createdAt": repo.commits[history[-1]]["date"],
            "lastModified": repo.commits[history[0]]["date"],
            "cardData": card,
            "siblings": [self.sibling(path, entry) for path, entry in files.items()],
            **{name: card[name] for name in ("library_name", "pipeline_tag") if name in card},
            **({"sdk": repo.sdk} if repo.repo_type == "space" else {}),
        }

    def sibling(self, path: str, entry: dict) -> dict:
        if self.query.get("blobs") != ["true"]:
            return {"rfilename": path}
        sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
        if "pointer_size" in entry:
            sibling["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}
        return sibling

    # Revisions

    @route("GET", REPO + "/refs")
    def refs(self, repo):
        listed = {"heads": [], "tags": [], "convert": [], "pr": []}
        for ref, commit in repo.refs.items():
            kind, name = ref.split("/", 1)
            listed[kind].append({"name": name, "ref": f"refs/{ref}", "targetCommit": commit})
        names = {"branches": "heads", "tags": "tags", "converts": "convert", "pullRequests": "pr"}
        return {name: listed[kind] for name, kind in names.items()}

    @route("GET", REPO + "/commits/(?P<revision>[^/]+)")
    def commits(self, repo, revision):
        commits = {commit: repo.commits[commit] for commit in repo.history(self.commit_of(repo, revision))}
        return [
            {
                "id": commit,
                "title": manifest["message"],
                "message": manifest["description"],
                "authors": [{"user": manifest["author"]}],
                "date": manifest["date"],
            }
            for commit, manifest in commits.items()
        ]

    @route("POST", REPO + "/branch/(?P<branch>[^/]+)")
    def create_branch(self, repo, branch):
        return self.add_ref(repo, f"heads/{branch}", json.loads(self.body or b"{}").get("startingPoint") or "main")

    @route("POST", REPO + "/tag/(?P<revision>[^/]+)")
    def create_tag(self, repo, revision):
        return self.add_ref(repo, f"tags/{json.loads(self.body)['tag']}", revision)

    def add_ref(self, repo: Repo, ref: str, revision: str) -> dict:
        self.check_write(repo.namespace)
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: refs/{ref}")
        repo.refs[ref] = self.commit_of(repo, revision)
        self.hub.store.save(repo)
        return {}

    # Files

    def described(self, path: str, entry: dict, commit: str, manifest: dict) -> dict:
        described = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
        if "pointer_size" in entry:
            described["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}
        if self.query.get("expand") == ["true"] or self.form.get("expand") == ["true"]:
            described["lastCommit"] = {"id": commit, "title": manifest["message"], "date": manifest["date"]}
        return described

    def folders(self, files: dict[str, dict]) -> dict[str, str]:
        names = {path.rsplit("/", i)[0] for path in files for i in range(1, path.count("/") + 1)}
        return {name: hashlib.sha1(name.encode()).hexdigest() for name in sorted(names)}

    @route("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, repo, revision, folder):
        commit = self.commit_of(repo, revision)
        manifest = repo.commits[commit]
        folders = self.folders(manifest["files"])
        start = f"{folder.rstrip('/')}/" if folder else ""
        if start and start[:-1] not in folders:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        listed = [{"type": "directory", "oid": oid, "size": 0, "path": name} for name, oid in folders.items()]
        listed += [self.described(path, entry, commit, manifest) for path, entry in manifest["files"].items()]
        below = [item for item in listed if item["path"].startswith(start)]
        if self.query.get("recursive") == ["true"]:
            return below
        return [item for item in below if "/" not in item["path"].removeprefix(start)]

    @route("POST", REPO + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo, revision):
        self.form = parse_qs(self.body.decode())
        commit = self.commit_of(repo, revision)
        manifest = repo.commits[commit]
        folders = self.folders(manifest["files"])
        answer = []
        for path in self.form.get("paths", []):
            if path in manifest["files"]:
                answer.append(self.described(path, manifest["files"][path], commit, manifest))
            elif path in folders:
                answer.append({"type": "directory", "oid": folders[path], "size": 0, "path": path})
        return answer

    @route("GET HEAD", GIT + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        self.check_gate(repo)
        commit = self.commit_of(repo, revision)
        entry = repo.commits[commit]["files"].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        data = self.hub.store.blob(entry["sha256"]).read_bytes()
        etag = entry["sha256"] if "pointer_size" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "pointer_size" in entry:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        status = 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first = int(asked[1]) if asked[1] else len(data) - int(asked[2])
            last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
            if first > last:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        return status, data, headers

    # Uploads

    @route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo, revision):
        self.check_write(repo.namespace)
        present = repo.commits[self.commit_of(repo, revision)]["files"]
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            entry = present.get(file["path"], {})
            oid = entry.get("sha256" if "pointer_size" in entry else "oid")
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", GIT + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.check_write(repo.namespace)
        answer = []
        for item in json.loads(self.body)["objects"]:
            if not self.hub.store.blob(item["oid"]).exists():
                upload = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repo.url_path}.git/info/lfs/verify"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            answer.append(item)
        return {"transfer": "basic", "objects": answer}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the sha256 that was announced")
        self.hub.store.add_blob(self.body)
        return {}

    @route("POST", GIT + r"\.git/info/lfs/verify")
    def lfs_verify(self, repo):
        item = json.loads(self.body)
        blob = self.hub.store.blob(item["oid"])
        if not blob.exists() or blob.stat().st_size != item["size"]:
            raise HubError(404, "Object not found or of another size")
        return {}

    @route("POST", REPO + "/commit/(?P<branch>[^/]+)")
    def commit(self, repo, branch):
        self.check_write(repo.namespace)
        head = repo.refs.get(repo.ref_of(branch))
        if head is None:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and not head.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head]["files"])
        for operation in operations:
            self.apply(files, operation["key"], operation["value"], repo.repo_type)
        summary, description = header["value"]["summary"], header["value"].get("description", "")
        commit = self.hub.store.commit(repo, branch, files, summary, description, self.user.name)
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.endpoint}/{repo.url_path}/commit/{commit}",
        }

    def apply(self, files: dict[str, dict], key: str, value: dict, repo_type: str) -> None:
        path, store = value["path"], self.hub.store
        if key == "file":
            data = base64.b64decode(value["content"])
            if path == "README.md" and (errors := validate_card(data.decode(), repo_type)[0]):
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = store.entry(data, lfs=False)
        elif key == "lfsFile":
            if not store.blob(value["oid"]).exists():
                raise HubError(400, f"{path} points to an LFS file that was not uploaded: {value['oid']}")
            files[path] = store.entry(store.blob(value["oid"]).read_bytes(), lfs=True)
        elif path.rstrip("/") not in [*files, *self.folders(files)]:
            raise HubError(400, f"{path} cannot be deleted: it does not exist", "EntryNotFound")
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
