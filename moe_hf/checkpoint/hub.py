"""Push an export to the model hub: one commit with everything, believed only when the hub shows the same files.

`huggingface_hub` sends and repeats the requests. Where it gives up nothing becomes visible, because a repository
changes by the last request alone, and the same push can be run again: what has arrived is not sent twice.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError, UserError
from .export_files import CARD_NAME, export_files, is_loaded
from .model_card import card_for_repository, render_model_card

# The form of all identifiers in the hub's list, which the hub itself checks.
_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")


class PushError(UserError):
    """The hub has not taken an export, or not all of it; the message says why and what to do."""


@dataclass(frozen=True)
class Pushed:
    """What a push has left on the hub, as the hub tells it."""

    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def check_repository(repo_id: str) -> None:
    """Raise `ConfigError` unless `repo_id` has the form ORG/NAME that the hub allows."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} cannot be the name of a repository: {' '.join(str(error).split())}") from None
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id!r} does not say whose repository it is; write ORG/NAME.")


def check_license(license: str | None) -> None:
    """Raise `ConfigError` unless `license` has the form of the hub's identifiers."""
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(f"--license {license!r} is not an identifier of the hub; write it like apache-2.0 or mit.")


def push_export(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push a whole export to the hub in one commit, and compare what is there with the folder.

    Args:
        folder: of the export; it is not changed.
        repo_id: ORG/NAME, created if it is not there.
        private: create it private, and refuse one that is public.
        revision: branch to push to, created if it is not there; `None` for the main one.
        commit_message: summary of the commit.
        license: identifier for the card's metadata; `None` leaves what the card says.
        token: `None` for the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        ConfigError: the name or the licence cannot be right.
        CheckpointError: the folder is not a whole export.
        PushError: the hub did not take it; nothing incomplete is visible there, and the same push may be run again.
    """
    check_repository(repo_id)
    check_license(license)
    with tempfile.TemporaryDirectory(prefix="moe_hf-push-") as staging:
        left_out = stage_export(Path(folder), Path(staging), repo_id=repo_id, license=license)
        return push_staged(
            Path(staging),
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            left_out=left_out,
            token=token,
        )


def stage_export(
    folder: Path, staging: Path, *, repo_id: str, license: str | None = None, outlives_folder: bool = False
) -> tuple[str, ...]:
    """Fill `staging` with links to the files of the export, and with its card as it is to be read on the hub.

    Args:
        folder: of the export.
        staging: an empty folder.
        repo_id: for the card's example.
        license: for the card's metadata.
        outlives_folder: make hard links, or copies where there are none, because `folder` may be deleted meanwhile.

    Returns:
        What lies in `folder` and does not belong to an export.

    Raises:
        CheckpointError: the folder is not a whole export.
    """
    folder = folder.resolve()
    names, left_out = export_files(folder)
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        if name != CARD_NAME:
            _link(folder / name, staging / name, outlives_folder)
    (staging / CARD_NAME).write_text(_card(folder, names, repo_id, license))
    return tuple(left_out)


def push_staged(
    staging: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    left_out: tuple[str, ...] = (),
    token: str | None = None,
) -> Pushed:
    """Push what `stage_export` has prepared; arguments and errors are those of `push_export`."""
    api = _api(token)
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    with _one_sentence(repo_id):
        repo_id, head = _open(api, repo_id, private=private, revision=revision)
        # What an earlier push has left would be loaded instead of, or together with, what comes now.
        stale = [file.rfilename for file in head.siblings if is_loaded(file.rfilename) and file.rfilename not in names]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
                *(CommitOperationAdd(name, str(staging / name)) for name in names),
            ],
            commit_message=commit_message or "Upload model",
            revision=revision,
            parent_commit=head.sha,
        )
        _verify(api, repo_id, commit.oid, staging)
    return Pushed(f"{api.endpoint}/{repo_id}", commit.oid, tuple(names), left_out)


def open_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Create the repository and the branch if they are not there, so that a push will find nothing in its way.

    Raises:
        PushError: there is no login, or it may not write there; or the repository is public and must not be.
    """
    with _one_sentence(repo_id):
        _open(_api(token), repo_id, private=private, revision=revision)


def _api(token: str | None) -> HfApi:
    # True: take the token of the login, and say so if there is none.
    return HfApi(token=token or True, library_name="moe_hf")


def _open(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None):
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision)
    if private and not head.private:
        raise PushError(f"{repo_id} is already there and public; make it private on the hub, or give another name.")
    return repo_id, head


def _verify(api: HfApi, repo_id: str, commit: str, staging: Path) -> None:
    """Compare names and contents of the commit with the files on disk, which are read again for it."""
    found = api.verify_repo_checksums(repo_id, revision=commit, local_dir=staging)
    surplus = [name for name in found.missing_paths if is_loaded(name)]
    wrong = [*found.extra_paths, *(mismatch["path"] for mismatch in found.mismatches), *surplus]
    if wrong:
        raise PushError(
            f"{repo_id} does not hold the export at commit {commit[:12]}: {', '.join(sorted(wrong)[:3])} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or different there; run the same push again."
        )


@contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    """Turn whatever the libraries raise into one `PushError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # HTTP, sockets, Xet's own errors: the library promises no common base
        # A header that cannot be sent is quoted in the message of the error that it causes.
        raise PushError(re.sub("Bearer [^'\"]*", "Bearer <token>", _sentence(repo_id, error))) from None


def _sentence(repo_id: str, error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return (
            f"You are not logged in to the hub, so nothing was pushed to {repo_id}; run hf auth login or set HF_TOKEN."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so nothing was pushed to {repo_id}; unset it."
    root = error
    while not isinstance(root, HfHubHTTPError) and root.__cause__ is not None:
        root = root.__cause__
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
    if status == 401:
        return f"The hub does not accept your login (401) for {repo_id}; run hf auth login or set HF_TOKEN."
    if status == 403:
        return f"Your login may not write to {repo_id} (403); take a token with write access, or another repository."
    told = dict.fromkeys(" ".join(str(e).split()).rstrip(".") or type(e).__name__ for e in (error, root))
    reason = re.sub(r" For more information check: \S+", ":", ": ".join(told))[:400]
    if status is not None and 400 <= status < 500 and status not in (408, 412, 429):
        return f"The hub refuses the push to {repo_id}: {reason}."
    # hf_xet raises Python's own; where the hub has no Xet there is no way back to LFS but to ask for it.
    hint = ", or with HF_HUB_DISABLE_XET=1 if this hub has no Xet" if isinstance(error, ConnectionError) else ""
    return f"The push to {repo_id} is not complete: {reason}; run it again, which sends only what is missing{hint}."


def _link(source: Path, destination: Path, is_hard: bool) -> None:
    source = source.resolve()
    if not is_hard:
        destination.symlink_to(source)
        return
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _card(folder: Path, names: list[str], repo_id: str, license: str | None) -> str:
    card = folder / CARD_NAME
    try:
        if CARD_NAME in names:
            text = card.read_text(encoding="utf-8")
        elif "configuration_moe.py" in names:
            text = render_model_card(MoEConfig.from_pretrained(folder), [])
        else:
            text = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {repo_id}\n"
        return card_for_repository(text, repo_id, license)
    except ValueError as error:
        raise CheckpointError(f"{card} cannot be used: {error}") from error
