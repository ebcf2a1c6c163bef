"""Composites on the Hugging Face hub: found by id, pushed as they are."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ExpertokenError, one_line

if TYPE_CHECKING:
    from .composite import Composite


def local_folder(path: Path | str, revision: str | None = None) -> Path:
    """The folder of a composite: itself, or where the hub's copy of `owner/name` is kept.

    Raises:
        ExpertokenError: there is no such folder, and no such repository either.
    """
    folder = Path(path)
    name = str(path)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # of HTTP, of the cache, of offline mode: the hub's client has many
        raise ExpertokenError(
            f"{name}: no such folder, and as a repository of the hub it can't be had ({one_line(error)})"
        ) from error


def push(composite: "Composite", repo: str, *, private: bool = True, message: str = "A composite of experts") -> str:
    """Write a composite and upload it. The token is the hub client's own (`hf auth login`, or `HF_TOKEN`).

    Args:
        composite: what to push.
        repo: `owner/name`.
        private: whether only its owner sees it; of a repository that is there nothing changes.
        message: of the commit.

    Returns:
        the address of the commit.

    Raises:
        ExpertokenError: its base or an expert is a folder of this machine, which nobody else has, or the hub refuses.
    """
    from huggingface_hub import HfApi

    from .composite import save_composite

    local = [expert for expert in composite.pool if expert.backend in ("transformers", "adapter")]
    models = [("the meta LLM's base", composite.meta.source.model)]
    models += [(f"expert {expert.name!r}", model) for expert in local for model in (expert.model, expert.base) if model]
    for what, model in models:
        if Path(model).expanduser().exists():
            raise ExpertokenError(
                f"{what} is a folder of this machine ({model}); push that first and name it by its id"
            )
    api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "composite"
        save_composite(composite, folder, verify=False)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
        except Exception as error:
            raise ExpertokenError(f"{repo}: the hub refuses ({one_line(error)})") from error
