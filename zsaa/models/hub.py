"""Models of the Hugging Face hub: from the local cache, else from the hub if it answers; and why it does not."""

import os
import re

from zsaa.models.errors import AssetError, DamagedError, UnreachedError, first_line, refetch
from zsaa.models.packages import PACKAGED
from zsaa.models.pretrained import from_pretrained

HUB_TIMEOUT = 5.0  # seconds for the question whether the hub is there, before anything that retries for a minute
PROXIES = [case(f"{what}_proxy") for what in ("https", "all", "http") for case in (str.upper, str.lower)]


def from_hub(repo_id, kind, num_labels, dtype, seed, kwargs):
    """Load a hub model from the local cache if it is whole there, else from the hub if that answers.

    The cache comes first so that a second run needs no network and gets the same weights; pass revision=, or
    force_download=True, for others. Without a network transformers retries for a minute, even when told to
    use local files only; so a cached snapshot is loaded as a folder, and the hub is asked once beforehand.
    """
    from huggingface_hub import snapshot_download

    unusable = None
    if not kwargs.get("force_download"):
        hub = {k: kwargs[k] for k in ("revision", "cache_dir") if k in kwargs}
        local = {k: v for k, v in kwargs.items() if k not in ("revision", "cache_dir", "token", "local_files_only")}
        try:
            folder = snapshot_download(repo_id, local_files_only=True, **hub)
            return from_pretrained(folder, kind, num_labels, dtype, seed, local)
        except DamagedError as error:
            raise DamagedError(f"{error} {refetch(repo_id)}") from error
        except AssetError as error:  # there is a snapshot, but not with all that is needed
            unusable = error
        except (OSError, ValueError) as error:  # nothing of it is in the cache
            if kwargs.get("local_files_only"):
                raise hub_error(error, repo_id) from error
    try:
        check_hub(repo_id, "model", kwargs.get("revision"), kwargs.get("token"))
        return from_pretrained(repo_id, kind, num_labels, dtype, seed, kwargs)
    except AssetError as error:
        if unusable is None:
            raise
        raise AssetError(f"{error}. What the cache has of it cannot be used: {unusable}") from error
    except (OSError, ValueError, ImportError) as error:  # a SOCKS proxy without its package is an ImportError
        raise hub_error(error, repo_id) from error


def check_hub(repo_id, repo_type="model", revision=None, token=None):
    """Ask the hub once, for seconds, whether it has `repo_id` ("model" or "dataset"); AssetError if not."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, token=token, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the hub's HTTP client raises: its name changes between versions
        raise hub_error(error, repo_id, repo_type) from error


def hub_error(error, repo_id, repo_type="model"):
    """The AssetError for whatever kept `repo_id` from being fetched."""
    from huggingface_hub import errors

    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
    command = f"hf download {repo_id}" + ("" if repo_type == "model" else f" --repo-type {repo_type}")
    what = "model" if repo_type == "model" else "data set"
    page = "https://huggingface.co/" + ("" if repo_type == "model" else "datasets/") + repo_id
    gated, absent = errors.GatedRepoError, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    if any(isinstance(e, gated) for e in chain):
        return AssetError(
            f"the {what} {repo_id!r} is gated: accept its licence at {page}, then `hf auth login` and `{command}`"
        )
    if any(isinstance(e, (*absent, errors.HFValidationError)) for e in chain) or status == 404:
        known = f", or one of the packaged models: {', '.join(PACKAGED)}" if repo_type == "model" else ""
        return AssetError(
            f"the Hugging Face hub has no public {what} {repo_id!r} (or no such revision of it). Check "
            f"the spelling{known}; for a private one, `hf auth login` first, then `{command}`"
        )
    if status in (401, 403):
        return AssetError(f"the hub refused the {what} {repo_id!r} (HTTP {status}): `hf auth login`, then `{command}`")
    if any(re.search("socks|proxy url", str(e), re.IGNORECASE) for e in chain):
        odd = [name for name in PROXIES if not os.environ.get(name, "http").lower().startswith("http")]
        named = odd[0] if odd else "a proxy variable"
        return UnreachedError(
            f"the {what} {repo_id!r} cannot be fetched through the proxy that {named} names. A SOCKS proxy (socks5:// "
            "or socks5h://) needs the package socksio: pip install socksio. Or name an http:// proxy, or unset "
            f"{named}. Then: {command}"
        )
    if isinstance(chain[0], ImportError):  # of something else
        raise chain[0]
    offline = any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain)
    if offline or any(isinstance(e, errors.LocalEntryNotFoundError) or _is_network(e) for e in chain):
        mode = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the hub does not answer"
        others = f" (the packaged models need no network: {', '.join(PACKAGED)})" if what == "model" else ""
        return UnreachedError(
            f"the {what} {repo_id!r} is not in the local cache, and {mode} ({type(chain[-1]).__name__}: "
            f"{first_line(chain[-1])}). With a network, get it with: {command}{others}"
        )
    return AssetError(
        f"the {what} {repo_id!r} could not be loaded: {first_line(chain[0])}. Fetch it again with: "
        f"{command} --force-download"
    )


def _is_network(error):
    """Whether an exception is about the connection; by module, as the hub's HTTP client changes its name."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "socket"))
