"""The child process of an engine: one JSON object a line on standard input, one on standard output for each.

`python -m validate.engines.worker KIND`. The first request must be `load`. Native libraries write to standard output
as they like, so the answers go to a copy of it and everything else to standard error. When the parent goes away,
standard input ends, and so does the process.
"""

import importlib
import json
import os
import resource
import sys
import traceback
from typing import Any, BinaryIO, Protocol

ADAPTERS = {
    "llama.cpp": ("streamquant.validate.engines.llama_cpp", "LlamaCpp", "xllamacpp"),
    "transformers": ("streamquant.validate.engines.hugging_face", "Transformers", "transformers"),
    "jinja": ("streamquant.validate.engines.hugging_face", "Jinja", "transformers"),
    "vllm": ("streamquant.validate.engines.vllm_offline", "Vllm", "vllm"),
}
"""Kind of engine -> module and class of its adapter, and the package that it needs."""
METHODS = frozenset(
    {"tokenize", "detokenize", "apply_template", "next_token_logprobs", "generate_greedy", "render", "special_tokens"}
)


class Adapter(Protocol):
    """An engine inside this process. Arguments and results of METHODS are plain JSON."""

    def load(self, **options: Any) -> dict[str, Any]:
        """Load the model; the fields of EngineFacts."""
        ...


def main() -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    adapter: Adapter | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if request["method"] == "load":
                _limit_memory(request["arguments"].pop("memory"))
                adapter = _import(sys.argv[1])
                result: Any = adapter.load(**request["arguments"])
            elif adapter is None or request["method"] not in METHODS:
                raise LookupError(f"no method {request['method']!r}")
            else:
                result = getattr(adapter, request["method"])(**request["arguments"])
            _answer(answers, {"result": result})
        except ModuleNotFoundError as error:
            _answer(answers, {"missing": error.name or str(error)})
        except ImportError as error:  # it is there, and cannot be used: nothing that a model could be blamed for
            _answer(answers, {"missing": ADAPTERS[sys.argv[1]][2], "why": f"cannot be used: {error}"})
        except Exception as error:
            traceback.print_exc()
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})
    # Threads of native libraries may hang at a regular exit.
    os._exit(0)


def _limit_memory(nbytes: int) -> None:
    """Let this process have so many bytes of data: a template can ask for strings of any length."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _import(kind: str) -> Adapter:
    module, name, _ = ADAPTERS[kind]
    adapter: Adapter = getattr(importlib.import_module(module), name)()
    return adapter


def _answer(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
