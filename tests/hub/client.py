"""huggingface_hub's client in process: what tests change of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from huggingface_hub.utils._http import close_session, default_client_factory, set_client_factory

from streamquant.hub.client import set_up_client


@contextmanager
def client_put_back() -> Iterator[None]:
    """Within it our client is set up anew when it is asked for; behind it tests have the library's own again."""
    with pytest.MonkeyPatch.context() as patch:
        close_session()  # that of other tests, with another factory
        for module in (_http, file_download):
            patch.setattr(module, "time", module.time)  # set_up_client changes it
        set_up_client.cache_clear()
        try:
            yield
        finally:
            close_session()
            set_client_factory(default_client_factory)
            set_up_client.cache_clear()


def keep_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody but the test close the client that all threads share.

    huggingface_hub closes it when a connection is refused (utils/_http.py, _http_backoff_base). What other threads are
    connecting then is never closed, and the warning about that is an error of whichever test runs when it is found.
    Retrying what was closed is ours: tests/publish/test_push_faults.py.
    """
    monkeypatch.setattr(_http, "close_session", lambda: None)
