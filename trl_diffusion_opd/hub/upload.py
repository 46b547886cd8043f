# SPDX-License-Identifier: Apache-2.0
"""Upload files to the Hub: who may write where, and what happens if it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import PASSING, explain_answer
from .waiting import limit_waits, retried


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import TrainingArguments

_WAITS = (5, 20)  # seconds between the attempts of a push, each of which huggingface_hub retries in its parts


class PushError(OSError):
    """Something could not be pushed to the Hub; the message names the repository and the remedy."""


def check_push(repo_id: str, *, token: str | None = None, repo_type: str = "model") -> str:
    """
    Checks that the account may write to a repository, without writing anything.

    Args:
        repo_id (`str`):
            `owner/name`, or `name` in the account's own namespace.
        token (`str`, *optional*):
            Token to use instead of the one of `hf auth login` or `HF_TOKEN`.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.

    Returns:
        `str`: the full `owner/name`.

    Raises:
        `PushError`: a name that the Hub does not take, no token, a token that is wrong or cannot write, a namespace of
            somebody else, or no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = HfApi(token=token)
    with push_errors(repo_id):
        validate_repo_id(repo_id)
        account = api.whoami()
        access = account.get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise PushError(
                f"Cannot push to {repo_id!r}: the token {access.get('displayName', '')!r} of {account['name']!r} can only "
                "read. Create one that can write at https://huggingface.co/settings/tokens and log in with it "
                "(`hf auth login`)."
            )
        owner, slash, name = repo_id.rpartition("/")
        repo_id = repo_id if slash else f"{account['name']}/{name}"
        own = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
        try:
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        except RepositoryNotFoundError as error:
            # The token of a role can see all that it may write to; a fine-grained one need not.
            if slash and owner not in own and access.get("role") == "write":
                raise PushError(
                    f"Cannot push to {repo_id!r}: {account['name']!r} is not a member of {owner!r}. Choose a name under "
                    f"{' or '.join(repr(f'{name}/...') for name in own)}, or ask to be let in."
                ) from error
    return repo_id


def check_destination(args: "TrainingArguments") -> str:
    """[`check_push`] for where a run is going to push: `hub_model_id`, by default named like the `output_dir`."""
    return check_push(args.hub_model_id or Path(args.output_dir).absolute().name, token=args.hub_token)


def create_repo(repo_id: str, *, token: str | None = None, private: bool | None = None, **kwargs) -> str:
    """Creates a repository unless it is there, after [`check_push`]; returns its full name."""
    from huggingface_hub import HfApi

    repo_id = check_push(repo_id, token=token, repo_type=kwargs.get("repo_type", "model"))
    with push_errors(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True, **kwargs).repo_id


def push_files(
    files: dict[str, bytes],
    repo_id: str,
    message: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    repo_type: str = "model",
) -> "CommitInfo":
    """
    Uploads files to an existing repository as one commit. Failures that may pass are tried again.

    Raises:
        `PushError`: it did not work.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=token)

    def push() -> "CommitInfo":
        if revision is not None and not revision.startswith("refs/"):  # such as a pull request's
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        try:
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path, content) for path, content in files.items()],
                commit_message=message,
                revision=revision,
                repo_type=repo_type,
            )
        except RuntimeError as error:  # what the clients of LFS and Xet make of a file that could not be uploaded
            if isinstance(error.__cause__, (HTTPError, OSError)):
                raise error.__cause__ from None
            raise ConnectionError(str(error)) from error

    with push_errors(repo_id):
        return retried(push, f"Pushing to {repo_id!r}", may_pass=_may_pass, waits=_WAITS)


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING or error.response.status_code >= 500
    return isinstance(error, (HTTPError, OSError)) and not isinstance(
        error, (LocalTokenNotFoundError, OfflineModeIsEnabled)
    )


def _explain(error: Exception, repo_id: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it."
    if isinstance(error, HfHubHTTPError):
        return explain_answer(error, f"{constants.ENDPOINT}/{repo_id}", writing=True)
    return f"{constants.ENDPOINT} could not be reached ({type(error).__name__}). Check the connection and HF_ENDPOINT."


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` into one [`PushError`] that says what to do."""
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

    where = f"Cannot push to {repo_id!r}"
    limit_waits()
    try:
        yield
    except PushError:
        raise
    except HFValidationError as error:
        raise PushError(f"{where}: the name must be `owner/name` or `name`. {error}") from error
    except LocalTokenNotFoundError as error:
        raise PushError(
            f"{where}: there is no token. Log in with `hf auth login`, or set HF_TOKEN to a token that can write "
            "(https://huggingface.co/settings/tokens)."
        ) from error
    except (HTTPError, OSError) as error:
        raise PushError(f"{where}: {_explain(error, repo_id)}") from error
    except ValueError as error:  # the Hub found something wrong with the front matter of the card
        raise PushError(f"{where}: {error}") from error
