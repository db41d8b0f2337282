"""Stands in for the hub's client: repositories are folders, and so are their revisions, `owner/name@revision`."""

import shutil
from pathlib import Path
from types import SimpleNamespace

from tests.small import contents


class FakeHub:
    """Repositories below `root`, used in place of huggingface_hub's client while `patch` lasts."""

    def __init__(self, root: Path, patch) -> None:
        self.root, self.created, self.public = root, [], set[str]()
        patch.setattr("huggingface_hub.HfApi", lambda: self)
        patch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.created.append((repo_id, private))

    def repo_info(self, repo_id):
        return SimpleNamespace(private=repo_id not in self.public)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        for name in contents(self.root / repo_id).keys() & {*delete_patterns}:
            (self.root / repo_id / name).unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, local_dir=None):
        held = self.root / (repo_id if revision is None else f"{repo_id}@{revision}")
        if not held.is_dir():
            raise OSError(f"404 Client Error.\nRepository Not Found for {repo_id}.")
        target = Path(local_dir or self.root / "cache")
        for name, content in contents(held).items():
            if name in allow_patterns:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(content)
        return str(target)
