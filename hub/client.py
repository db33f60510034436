"""The Hub's client as uploads need it: quiet, with time-outs, and with a token."""

import functools
import os

from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from streamquant.hub.http_library import httpx
from streamquant.hub.repo import quiet_client
from streamquant.quant.errors import StreamquantError

TIMEOUT = httpx.Timeout(300.0, connect=30.0)
"""Seconds without a byte until a connection is given up; the client's own default is never."""


def connect(*, to_write: bool = True) -> HfApi:
    """The Hub's client, quiet and with time-outs.

    Raises StreamquantError in offline mode and, `to_write`, without a token.
    """
    where = constants.ENDPOINT
    if constants.is_offline_mode():
        raise StreamquantError(
            "the Hub is switched off", where=where, found="HF_HUB_OFFLINE=1", hint="unset HF_HUB_OFFLINE to upload"
        )
    if to_write and get_token() is None and "HF_OIDC_RESOURCE" not in os.environ:
        raise StreamquantError(
            "no token for the Hub",
            where=where,
            required="a token with write access",
            hint="run `hf auth login`, or set HF_TOKEN",
        )
    set_up_client()
    return HfApi(library_name="streamquant")


@functools.cache
def set_up_client() -> None:
    """Once in a process: a new factory closes the connections of all threads."""
    quiet_client()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    set_client_factory(_client_with_timeouts)


def _client_with_timeouts() -> httpx.Client:
    client = default_client_factory()
    client.timeout = TIMEOUT
    return client
