"""What a model is called by the folder that it lies in, and the cache of the Hub's client as such a folder."""

import os
from pathlib import Path

CLIENT = "models--"
"""How the Hub's client calls the folder of a repository: models--ORG--NAME."""


def name_of(folder: Path) -> str:
    """The name of the model in a folder: the name by which the folder is given, also if that is a link.

    A snapshot in the cache of the Hub's client is called by its commit; its model has the name of the repository.

    >>> name_of(Path("/cache/models--NousResearch--Hermes-4-14B/snapshots/0123abc"))
    'Hermes-4-14B'
    >>> name_of(Path("/models/Hermes-4-14B/"))
    'Hermes-4-14B'
    """
    given = folder if folder.name not in ("", "..") else Path(os.path.realpath(folder))
    repository = repository_of(given.absolute()) if given.absolute().parent.name == "snapshots" else None
    return given.name if repository is None else repository.name.removeprefix(CLIENT).rpartition("--")[2]


def repository_of(folder: Path) -> Path | None:
    """The folder of the repository, in the cache of the Hub's client, whose snapshot a folder is or lies in."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith(CLIENT):
            return path.parent.parent
    return None
