"""What can go wrong with a model or data set: one kind of error, which names it and the command that mends it."""


class AssetError(RuntimeError):
    """A model or data set is missing, out of reach or damaged; the message says which one and what to do."""


class DamagedError(AssetError):
    """The AssetError for files that are there, but are not what they were."""


class UnreachedError(AssetError):
    """The AssetError for a hub that does not answer, or must not be asked."""


def first_line(error):
    """What an exception says first; its name, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refetch(repo_id):
    """The remedy for a damaged copy of a hub model."""
    return f"Fetch it again with: hf download {repo_id} --force-download"
