# SPDX-License-Identifier: Apache-2.0
"""Repositories in a folder: blobs by their sha256, commits as JSON manifests, branches and tags. For `hub_server.py`."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


LFS_SUFFIXES = (
    ".7z .arrow .bin .ckpt .gz .h5 .npy .npz .onnx .parquet .pickle .pkl .pt .pth .safetensors .tar .zip".split()
)


def git_oid(data: bytes) -> str:
    """Returns the name that git gives to a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Like the Hub: known suffixes, large files and bytes that are no text go to LFS."""
    try:
        sample[:-4].decode()  # the sample may end within a character
    except UnicodeDecodeError:
        return size > 0
    return size > 0 and (Path(path).suffix in LFS_SUFFIXES or size > 10 * 2**20 or b"\0" in sample)


@dataclass
class Repo:
    """One repository. `refs` maps `heads/main` or `tags/v1` to a commit, and `commits` a commit to its manifest."""

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    allowed: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    @staticmethod
    def ref_of(branch: str) -> str:
        """Returns the ref that a commit goes to: that of a branch, or for `refs/pr/1` that of a pull request."""
        return branch.removeprefix("refs/") if branch.startswith("refs/") else f"heads/{branch}"

    def resolve(self, revision: str) -> str:
        """Returns the commit of a branch, a tag, a full or short commit hash. Raises `KeyError` for others."""
        for ref in (self.ref_of(revision), f"tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for commit in self.commits:
                if commit.startswith(revision):
                    return commit
        raise KeyError(revision)

    def history(self, commit: str | None) -> list[str]:
        """Returns the commit and its ancestors, the newest first."""
        commits = []
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit]["parent"]
        return commits


class Store:
    """
    The repositories of a server.

    Args:
        folder (`Path`):
            Where everything is written: `blobs/<sha256>` and `<type>s/<owner>/<name>/` with `repo.json` and
            `commits/<commit>.json`. What is there already is read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.repos: dict[tuple[str, str], Repo] = {}
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*/*/*/repo.json"):
            commits = {file.stem: json.loads(file.read_text()) for file in path.parent.glob("commits/*.json")}
            repo = Repo(**json.loads(path.read_text()), commits=commits)
            self.repos[repo.repo_type, repo.repo_id] = repo

    def add_blob(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / sha256).write_bytes(data)
        return sha256

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def add_repo(self, repo: Repo) -> Repo:
        self.repos[repo.repo_type, repo.repo_id] = repo
        self.save(repo)
        return repo

    def entry(self, data: bytes, lfs: bool) -> dict:
        """Stores a file and returns its line in a manifest."""
        sha256 = self.add_blob(data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        entry = {"sha256": sha256, "size": len(data), "oid": git_oid(pointer if lfs else data)}
        return {**entry, "pointer_size": len(pointer)} if lfs else entry

    def commit(
        self, repo: Repo, branch: str, files: dict[str, dict], message: str, description: str = "", author: str = ""
    ) -> str:
        """Writes a commit that holds exactly `files` (path -> entry), moves the branch to it and returns its hash."""
        manifest = {
            "parent": repo.refs.get(repo.ref_of(branch)),
            "message": message,
            "description": description,
            "author": author,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "files": dict(sorted(files.items())),
        }
        commit = hashlib.sha1(json.dumps([repo.url_path, manifest]).encode()).hexdigest()
        repo.commits[commit] = manifest
        repo.refs[repo.ref_of(branch)] = commit
        self.save(repo)
        return commit

    def save(self, repo: Repo) -> None:
        folder = self.folder / f"{repo.repo_type}s" / repo.repo_id
        (folder / "commits").mkdir(parents=True, exist_ok=True)
        for commit, manifest in repo.commits.items():
            path = folder / "commits" / f"{commit}.json"
            if not path.exists():
                path.write_text(json.dumps(manifest, indent=2))
        settings = {name: value for name, value in vars(repo).items() if name != "commits"}
        (folder / "repo.json").write_text(json.dumps(settings, indent=2))
