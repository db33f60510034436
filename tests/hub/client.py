"""huggingface_hub's client in process: what tests change of it."""

import pytest
from huggingface_hub.utils import _http


def keep_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody but the test close the client that all threads share.

    huggingface_hub closes it when a connection is refused (utils/_http.py, _http_backoff_base). What other threads are
    connecting then is never closed, and the warning about that is an error of whichever test runs when it is found.
    Retrying what was closed is ours: tests/publish/test_push_faults.py.
    """
    monkeypatch.setattr(_http, "close_session", lambda: None)
