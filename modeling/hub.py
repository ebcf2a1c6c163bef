"""Upload of composites to the Hugging Face hub. `files.local_folder` downloads them by their id."""

import tempfile
from dataclasses import replace
from pathlib import Path

from .composite import Composite
from .errors import ExpertokenError, one_line
from .model_card import copy_scores
from .saving import save_composite
from .source import local_path


def push(composite: Composite, repo: str, *, private: bool = True, message: str = "A composite of experts") -> str:
    """Write a composite and upload it, with the hub client's own token (`hf auth login`, or `HF_TOKEN`).

    Args:
        composite: Composite to upload.
        repo: Repository, as `owner/name`.
        private: If true, a new repository is visible to its owner only. An existing repository keeps its visibility.
        message: Message of the commit.

    Returns:
        Address of the commit.

    Raises:
        ExpertokenError: The base or an expert is a folder of this machine, which other machines lack, or the hub
            refuses the upload.
    """
    from huggingface_hub import HfApi

    models = [("the meta LLM's base", composite.meta.source.model)]
    for expert in composite.pool:
        paths = (expert.entry().get(key) for key in expert.kind.paths)
        models += [(f"expert {expert.name!r}", path) for path in paths if path]
    for what, model in models:
        if local_path(model).exists():
            raise ExpertokenError(
                f"expected hub ids in the composite, but {what} is a folder of this machine ({model}). Push that "
                "folder first and name it by its id"
            )
    api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "composite"
        # A path of this machine means nothing elsewhere.
        data = {key: value for key, value in composite.manifest.data.items() if key != "path"}
        public = replace(composite, manifest=replace(composite.manifest, data=data))
        save_composite(public, folder, verify=False)
        if composite.folder is not None:
            copy_scores(composite.folder, folder)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
        except Exception as error:
            raise ExpertokenError(f"{repo}: the hub refuses the upload ({one_line(error)})") from error
