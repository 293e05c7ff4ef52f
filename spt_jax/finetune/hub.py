"""Results put on the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

_log = logging.getLogger(__name__)


def check_access(repository: str) -> None:
    """Raise unless a result can be put into a repository, before anything is computed.

    Args:
        repository: id of the form owner/name, or a name of one's own account's.

    Raises:
        ValueError: it is no id, or nobody is logged in.
        ConnectionError: the Hub cannot be reached.
    """
    try:
        validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise ValueError(f"push_to_hub {repository!r} is no id of a repository: {error}") from None
    try:
        huggingface_hub.HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        raise ValueError(
            f"nobody is logged in, who could push to {repository}: run `hf auth login`, or set "
            "HF_TOKEN, or leave out push_to_hub"
        ) from None
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise _unreachable(repository, error) from error
        raise ValueError(
            f"the Hub refuses the token, so that nothing can be pushed to {repository}: run "
            "`hf auth login` again, with a token that may write"
        ) from None
    except (OSError, errors.HTTPError) as error:
        raise _unreachable(repository, error) from error


def _unreachable(repository: str, error: Exception) -> ConnectionError:
    reason = (str(error) or repr(error)).splitlines()[0]
    return ConnectionError(
        f"the Hugging Face Hub cannot be reached ({reason}), so that nothing can be pushed to "
        f"{repository}; check the network, or leave out push_to_hub"
    )


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Put a result into a repository, which is made if it is not there.

    Args:
        directory: of the result.
        repository: see `check_access`.
        private: whether a new repository is; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        ConnectionError: the Hub cannot be reached, or refuses; the result stays on disk.
    """
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=directory, commit_message="Upload from spt-jax"
        )
    except (OSError, errors.HTTPError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConnectionError(
            f"{directory} is complete but could not be pushed to {repository} ({reason}); push it "
            f"with `hf upload {repository} {directory}`"
        ) from error
    _log.info("pushed to %s", made)
    return str(made)
