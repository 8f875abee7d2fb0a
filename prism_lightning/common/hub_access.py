"""Whether the Hugging Face hub answers for a repository, found out once and within seconds."""

from __future__ import annotations

from functools import lru_cache

TIMEOUT = 5  # seconds; opening a file of the hub without a network takes the library 23 s of retries


@lru_cache(maxsize=16)
def hub_problem(repository: str) -> str | None:
    """Return why the hub gives nothing of a model repository; None where it does.

    Files in the local cache can be read in either case, with `local_files_only`.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off by HF_HUB_OFFLINE"
    try:
        HfApi(library_name="prism_lightning").model_info(repository, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        return "it is not on the Hugging Face hub, or not open to you"
    except Exception as error:  # of the network: there are many types
        return f"no answer from the Hugging Face hub ({(' '.join(str(error).split()) or type(error).__name__)[:100]})"
    return None
