"""Uploads to the Hugging Face hub, made only on request."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from fastpref.errors import UserError, one_line


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder to "user/name" and return its address.

    A repository that does not exist is created, private unless `public`. Raises UserError.
    """
    check_login(repository)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Trained by preferences with fastpref")
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{repository}: {folder} could not be uploaded: {one_line(error)}") from None
    return str(address)


def check_login(repository: str) -> None:
    """Raise UserError if the hub would refuse an upload, so that this is known before hours of training."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: nothing can be uploaded while the hub is not asked (HF_HUB_OFFLINE, --offline)")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"{repository}: nobody is logged in to the hub here; run `hf auth login`") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{repository}: the hub refuses, or cannot be reached: {one_line(error)}") from None
