"""Send the files of a run to a repository on the Hub, with huggingface_hub and its settings (HF_TOKEN, HF_ENDPOINT).

No half-sent model is ever seen: the large files go first, one after the other, and one commit at the end makes all of
them part of the repository. What has arrived is not sent again after an interruption. The token is neither printed nor
part of an error message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ollama_forge import __version__
from ollama_forge.checkpoints.companions import CARD
from ollama_forge.checkpoints.hub import TransferError
from ollama_forge.errors import ForgeError, UsageError, first_line
from ollama_forge.files import human_size
from ollama_forge.progress import say
from ollama_forge.publishing.contents import Contents, PublishedFile
from ollama_forge.quiet import bars_on_terminals_only

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = "model*.safetensors*"  # shards and index of a checkpoint
_SHOWN = 3
_NO_TOKEN = (
    "make a token that may write, in the settings of your account on the Hub, then: hf auth login, or set HF_TOKEN"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: its size in bytes, and its SHA-256 if it is a large one, else its id in git."""

    size: int
    sha256: str | None
    git_id: str | None

    def equals(self, file: PublishedFile) -> bool:
        """Whether it has the content of ``file``. Reads ``file`` only if the sizes agree."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 else self.git_id == file.git_id


@dataclass(frozen=True)
class Comparison:
    """A repository beside what is to go there.

    Attributes:
        exists: whether there is such a repository.
        public: whether it is public, or will be.
        commit: its newest commit; None if it does not exist yet.
        send: files that it lacks, or has with another content and ``replace``.
        equal: number of files that it has already.
        kept: whether it has another model card, which stays.
        delete: weights of another checkpoint in it, which would be loaded beside the new ones.
    """

    contents: Contents
    exists: bool
    public: bool
    commit: str | None = None
    send: tuple[PublishedFile, ...] = ()
    equal: int = 0
    kept: bool = False
    delete: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes to send."""
        return sum(file.size for file in self.send)


def compare(contents: Contents, *, public: bool = False, replace: bool = False) -> Comparison:
    """Ask the Hub what its repository holds already, and who may write there. Sends nothing.

    Args:
        public: whether a new repository will be public.
        replace: overwrite files that have another content.

    Raises:
        ForgeError: there is no token, or it may not write there; the repository is public without ``public``, or holds
            other files of the same names without ``replace``; or the Hub does not answer.
        UsageError: the repository's name has not the form ``owner/name``.
    """
    repo = contents.repo
    if not _REPO.fullmatch(repo):
        raise UsageError(f"--repo {repo!r} is no repository of the Hub", "give owner/name, as in --repo alice/my-model")
    with _hub_errors(repo):
        api = _api()
        _require_writer(api, repo)
        info = _repo_info(api, repo)
    if info is None:
        return Comparison(contents, False, public, send=contents.files)
    if not info.private and not public:
        raise ForgeError(
            f"{repo} exists and is public",
            "add --public to publish there, or give another --repo, which will be private",
        )
    remote = _remote_files(info)
    there = [file for file in contents.files if file.path in remote]
    differing = [file for file in there if not remote[file.path].equals(file)]
    kept = not replace and any(file.path == CARD for file in differing)
    conflicts = [file.path for file in differing if file.path != CARD]
    if conflicts and not replace:
        more = f" and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
        raise ForgeError(
            f"{repo} exists and holds other content: {', '.join(conflicts[:_SHOWN])}{more}",
            "give another --repo, or add --replace to overwrite these files (the history keeps the old ones)",
        )
    same = {file.path for file in there} - {file.path for file in differing}
    send = tuple(file for file in contents.files if file.path not in same and not (kept and file.path == CARD))
    delete = _stale(contents, remote) if replace else ()
    return Comparison(contents, True, not info.private, info.sha, send, len(same), kept, delete)


def upload(found: Comparison) -> str:
    """Send what the repository lacks, in one commit, and check that it then holds it.

    Returns:
        The address of the commit; that of the newest one if there was nothing to send.

    Raises:
        ForgeError: the token may not write there, the repository has changed in the meantime, the transfer broke off
            (what has arrived is not sent again), or the Hub does not list afterwards what was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = found.contents.repo
    with _hub_errors(repo), bars_on_terminals_only():
        api = _api()
        if not found.exists:
            api.create_repo(repo, private=not found.public)
            found = replace(found, commit=api.model_info(repo).sha)
        if not found.send and not found.delete:
            return f"{api.endpoint}/{repo}/commit/{found.commit}"
        additions = []
        for number, file in enumerate(found.send, start=1):
            source = file.source if isinstance(file.source, bytes) else str(file.source)
            addition = CommitOperationAdd(file.path, source)
            say(f"sending {file.path} ({human_size(file.size)}), {number} of {len(found.send)}")
            api.preupload_lfs_files(repo, [addition], free_memory=False)
            additions.append(addition)
        commit = api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path) for path in found.delete)],
            commit_message=f"Upload {found.contents.name} with ollama-forge {__version__}",
            parent_commit=found.commit,
        )
        _require_sent(found.send, _remote_files(api.model_info(repo, files_metadata=True)), repo)
    return str(commit.commit_url)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="ollama-forge", library_version=__version__)


def _require_writer(api: HfApi, repo: str) -> None:
    """Check that there is a token, and that as far as it tells it may write to ``repo``."""
    from huggingface_hub import get_token

    if not get_token():
        raise ForgeError(f"there is no token to write to {repo}", _NO_TOKEN)
    account: Mapping[str, Any] = api.whoami()
    owners = [account["name"], *(entry["name"] for entry in account.get("orgs") or ())]
    owner = repo.split("/")[0]
    if owner.lower() not in map(str.lower, owners):
        raise ForgeError(f"the token may not write to {owner}'s repositories", f"it may write to {', '.join(owners)}")
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ForgeError("the token may read only", _NO_TOKEN)


def _repo_info(api: HfApi, repo: str) -> Any:
    """What the Hub says of the repository and its files; None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _remote_files(info: Any) -> dict[str, RemoteFile]:
    return {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in info.siblings or ()
    }


def _stale(contents: Contents, remote: Mapping[str, RemoteFile]) -> tuple[str, ...]:
    """Weights in the repository that are none of the new checkpoint's."""
    if "checkpoint" not in contents.parts:
        return ()
    ours = {file.path for file in contents.files}
    return tuple(path for path in remote if fnmatchcase(path, _WEIGHTS) and path not in ours)


def _require_sent(sent: Sequence[PublishedFile], remote: Mapping[str, RemoteFile], repo: str) -> None:
    missing = [file.path for file in sent if file.path not in remote or not remote[file.path].equals(file)]
    if missing:
        raise ForgeError(
            f"{repo} lacks {len(missing)} of the {len(sent)} files that were sent, such as {missing[0]}",
            "repeat the command; a .gitignore in the repository keeps files out",
        )


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into ForgeError, without the token."""
    try:
        yield
    except ForgeError:
        raise
    except Exception as error:  # the exception depends on the HTTP library that huggingface_hub uses
        status, said = _answer(error)
        if status == 401:
            raise ForgeError("the Hub does not accept the token", _NO_TOKEN) from None
        if status in (402, 403):
            raise ForgeError(
                f"the Hub does not let this token write to {repo}: {said}",
                "a fine-grained token needs write access to this repository, or to repositories of its owner",
            ) from None
        if status in (409, 412):
            raise ForgeError(
                f"{repo} has changed in the meantime: {said}", "repeat the command, which compares it again"
            ) from None
        raise TransferError(
            f"{repo} could not be reached or written: {said}",
            "repeat the command: files that have arrived are not sent again",
        ) from None


def _answer(error: BaseException) -> tuple[int | None, str]:
    """The status with which the Hub answered, None if it did not, and what it said; no address, which may be signed."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            said = getattr(cause, "server_message", None) or f"{response.status_code} {response.reason_phrase}"
            return response.status_code, _without_token(said.splitlines()[0][:300])
        error, cause = cause, cause.__cause__
    return None, _without_token(first_line(error))


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    return text.replace(get_token() or "\0", "***")
