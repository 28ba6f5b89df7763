"""An exported folder on the Hugging Face hub: a step of its own, that can be done again.

Guarantees: what the repository has in `data/` afterwards are the folder's parts, all in one commit, or it is
as it was. Parts that are there already are not sent again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from penstock.errors import ConfigError, WriteFailed

DATA: Final = "data"
"""Folder of the repository in which the library looks for the rows of a dataset."""

DENIED: Final = (401, 403)
"""Statuses of a hub that wants another token."""


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Put the Parquet parts in `folder` into the dataset `repository`, which is made where there is none.

    The token is the environment's HF_TOKEN, or that of `hf auth login`; HF_ENDPOINT names another hub.
    Returns the address of the dataset. Raises ConfigError where the hub refuses, WriteFailed where it fails.
    """
    parts = sorted(folder.glob("*.parquet"))
    if not parts:
        raise ConfigError(f"{folder} holds no Parquet files to push.")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ConfigError(
            "Pushing to the hub needs the package huggingface_hub: pip install 'penstock[datasets]'."
        ) from None
    hub: Any = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            path_in_repo=DATA,
            allow_patterns="*.parquet",
            delete_patterns="*.parquet",
            commit_message=f"{len(parts)} parts from penstock",
        )
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no name of a dataset: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in DENIED:
            raise ConfigError(
                f"The hub does not let {repository} be written ({_first_line(error)}): HF_TOKEN must be a "
                "token that may write it."
            ) from None
        raise _failed(folder, repository, error) from None
    except Exception as error:  # connections break in the library's own HTTP client, whichever that is
        raise _failed(folder, repository, error) from None
    return f"{hub.endpoint}/datasets/{repository}"


def _failed(folder: Path, repository: str, error: Exception) -> WriteFailed:
    return WriteFailed(
        f"{folder} could not be pushed to {repository} ({_first_line(error)}); it is whole, and the same "
        "command pushes it again."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
