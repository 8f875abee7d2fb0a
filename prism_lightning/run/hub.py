"""Models on the Hugging Face hub: send a folder, or fetch one into a run directory. Importing this needs no torch."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning import __version__
from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.common.files import CHECKSUMS, mismatch, partial_folder, read_json, write_checksums
from prism_lightning.run.directory import RunPaths

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
CARD = "README.md"  # people edit it on the hub, so that its checksum is not compared
# What `pull` takes: weights that no pickle is in, settings, tokenizer and card; no code, and nothing in subfolders.
TAKEN = ("*.safetensors", "*.json", "merges.txt", "chat_template.jinja", CARD)
TIMEOUT = 5  # seconds to the first answer; the library alone would wait 10 and ask again
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may"


def check_repository(name: str, option: str) -> None:
    """Raise UserError if a name is not of the form USER/NAME."""
    if not REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise UserError(f"{option} {name!r} is no repository: give USER/NAME, for example alice/small_prism")


def send_model(folder: Path, repository: str, private: bool) -> str:
    """Create a repository unless it exists, upload a folder to it, and return its address.

    Args:
        folder: with the files to upload.
        repository: USER/NAME.
        private: create it as private; a public one that exists is refused before anything is uploaded.

    Raises:
        UserError: no token or one without the right, no connection, or the hub refuses.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"nothing was sent, since there is no Hugging Face token: {LOGIN} write")
    api = _api()
    with _explained(repository, f"{LOGIN} write there"):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository, timeout=TIMEOUT).private:
            raise UserError(
                f"nothing was sent, since {repository} exists and is public: give another --repo, or make it private"
                " in its settings"
            )
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message=f"Model written by prism_lightning {__version__}"
        )
    return str(address)


def fetch_model(repository: str, revision: str | None, out: Path) -> list[Path]:
    """Download a PRISM model to OUT/model, completely or not at all, and return its files.

    Nothing that is downloaded is executed: only safetensors, JSON, tokenizer files and the card are taken.

    Args:
        repository: USER/NAME.
        revision: branch, tag or commit; None for the main branch.
        out: run directory to make; it must not exist.

    Raises:
        UserError: `out` exists, no connection, no such repository or revision, no PRISM model, or damaged files.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists: give a folder that does not exist, or remove it")
    with _explained(repository, f"check the name, or {LOGIN} read it"):
        info = _api().model_info(repository, revision=revision, timeout=TIMEOUT, files_metadata=True)
        _check_model_type(repository, info)
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out) as partial:
            model = RunPaths(partial).model
            _download(repository, info, model)
            problem = _damage(model, info)
            if problem:
                raise UserError(f"{repository}: {problem}; nothing was kept: pull again, or ask its owner")
            write_checksums(model)  # of the files that were taken
    return sorted(RunPaths(out).model.iterdir())


def _check_model_type(repository: str, info: Any) -> None:
    """Raise UserError if config.json, which is downloaded first, is not that of a PRISM model."""
    from huggingface_hub import hf_hub_download

    names = {sibling.rfilename for sibling in info.siblings or ()}
    model_type = None
    if "config.json" in names:
        with tempfile.TemporaryDirectory() as folder:
            path = hf_hub_download(repository, "config.json", revision=info.sha, local_dir=folder, etag_timeout=TIMEOUT)
            model_type = (read_json(Path(path)) or {}).get("model_type")
    if model_type is None:
        raise UserError(
            f"{repository} holds no model (no config.json that names a model_type): give another repository"
        )
    if model_type != "prism":
        raise UserError(
            f"{repository} is a {str(model_type)[:40]} model without prototypes: fit them with `retrofit --model"
            f" {repository}`"
        )
    if not any(fnmatch.fnmatchcase(name, "*.safetensors") and "/" not in name for name in names):
        raise UserError(f"{repository} has no weights in safetensors, and pickles are not opened: ask its owner")


def _download(repository: str, info: Any, folder: Path) -> None:
    """Download what is taken, one file after the other: threads of the library would not stop for Ctrl-C."""
    from huggingface_hub import hf_hub_download

    for sibling in info.siblings or ():
        if _is_taken(sibling.rfilename):
            hf_hub_download(repository, sibling.rfilename, revision=info.sha, local_dir=folder, etag_timeout=TIMEOUT)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on the download


def _damage(folder: Path, info: Any) -> str | None:
    """Return what differs from the hub's list of files, and from the checksums of the exporting program; or None."""
    for sibling in info.siblings or ():
        path = folder / sibling.rfilename
        if not _is_taken(sibling.rfilename):
            continue
        if not path.is_file():
            return f"{sibling.rfilename} was not downloaded"
        if sibling.size is not None and path.stat().st_size != sibling.size:
            return f"{sibling.rfilename} has {path.stat().st_size} of {sibling.size} bytes"
        if sibling.lfs is not None and _sha256(path) != sibling.lfs.sha256:
            return f"{sibling.rfilename} does not match its SHA-256"
    for name, facts in (read_json(folder / CHECKSUMS) or {}).items():
        if _is_taken(name) and name != CARD and isinstance(facts, dict):
            problem = mismatch(folder / name, facts)
            if problem:
                return f"{name} {problem}"
    return None


def _is_taken(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in TAKEN)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="prism_lightning", library_version=__version__)


@contextmanager
def _explained(repository: str, access: str) -> Iterator[None]:
    """Turn errors of the hub and the network into one line with a fix.

    Args:
        repository: that the block works on.
        access: what to do where it is missing or closed: the hub does not tell these apart.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repository}: the hub is switched off by HF_HUB_OFFLINE: unset it") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no such revision: give a branch, a tag or a commit by --revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repository} is not on the hub, or is not open to you: {access}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        fix = access if code in (401, 403) else "try again later"
        raise UserError(f"{repository}: the hub answers {code} ({_first_line(error)}): {fix}") from error
    except Exception as error:  # of the network: there are many types
        if disk_is_full(error):
            raise
        raise UserError(
            f"{repository}: no usable answer from the Hugging Face hub ({_first_line(error)}): check the network, and"
            " HF_ENDPOINT if it is set"
        ) from error


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
