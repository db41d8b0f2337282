"""The hub, by its own client: one folder up, a few named files down."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from buddy.errors import RunError
from buddy.handover.layout import FILES


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Put a folder's files into the hub's repository `owner/name`, made where it is missing; its address.

    Files of an earlier run that this one lacks, an adapter say, go away there; what is no file of a run stays.

    Raises:
        RunError: no token, no network, or no right to write there.
    """
    from huggingface_hub import HfApi

    client = HfApi()
    try:
        client.create_repo(name, private=private or None, exist_ok=True)
        client.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload with Buddy", delete_patterns=list(FILES)
        )
    except Exception as error:  # no network, no token, no such owner, … each has its own error, all the user's
        raise _refused(f"{name} cannot be written on the hub", error, "log in with `hf auth login`") from error
    return f"https://huggingface.co/{name}"


def download(name: str, revision: str | None = None, folder: Path | None = None) -> Path:
    """The folder with the files of a run, of the hub's repository `owner/name`.

    Args:
        name: of the repository.
        revision: branch, tag or commit.
        folder: where they go; None for the hub's own cache.

    Raises:
        RunError: no such repository or revision, no network, or no right to read it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_dir=folder))
    except Exception as error:
        raise _refused(f"{name} cannot be read from the hub", error, "check the name, or give a folder") from error


def _refused(what: str, error: Exception, advice: str) -> RunError:
    reason = shorten(str(error) or type(error).__name__, 200, placeholder=" …").rstrip(".")
    return RunError(f"{what} ({reason}); {advice}.")
