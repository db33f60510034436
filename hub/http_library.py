"""The HTTP library that the installed huggingface_hub speaks with: httpx up to 1.x, httpx2 from 2.0, of the same names.

Only its exceptions and time-outs are those of the client, so it is asked of the client, whichever else is installed.
"""

import importlib
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

if TYPE_CHECKING:
    import httpx
else:
    _base = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    httpx = importlib.import_module(_base.__module__.partition(".")[0])

__all__ = ["httpx"]
