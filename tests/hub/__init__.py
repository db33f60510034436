"""A small Hugging Face Hub on loopback, for the unmodified huggingface_hub client. Checked with huggingface_hub 1.33.0.

    with Hub() as hub:
        hub.add_repo("ORG/NAME", folder)
        HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).model_info("ORG/NAME", files_metadata=True)
        hub.arm(Fault(method="GET", host="cdn", path="*.safetensors", cut_after=1000))
        hub.requests, hub.sent_by_file(), hub.leaked_tokens()

In a process of its own: HubProcess, which runs `python -m tests.hub --root DIR`.

Content blobs.py; state repos.py; faults.py and record.py; requests and answers protocol.py; routes reading.py,
writing.py, lfs.py, xet.py, cards.py and admin.py; HTTP server.py; the whole hub.py and process.py.
"""

from tests.hub.blobs import SparseFile
from tests.hub.faults import Fault, lost_commit, move_main, rate_limit, refuse_token
from tests.hub.hub import READ_TOKEN, WRITE_TOKEN, Hub
from tests.hub.process import HubProcess
from tests.hub.record import Request
from tests.hub.repos import Commit, Repo, Token

__all__ = [
    "READ_TOKEN",
    "WRITE_TOKEN",
    "Commit",
    "Fault",
    "Hub",
    "HubProcess",
    "Repo",
    "Request",
    "SparseFile",
    "Token",
    "lost_commit",
    "move_main",
    "rate_limit",
    "refuse_token",
]
