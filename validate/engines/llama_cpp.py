"""llama.cpp through the package xllamacpp: its own server, in this process, asked over HTTP on the loopback.

Runs in the child process of validate/engines/process.py: one Server to a process is the safe assumption. Endpoints and
fields: tools/server/README.md of llama.cpp.
"""

import http.client
import importlib.metadata
import json
import urllib.parse
from typing import Any

TOKENIZER_CONTEXT = 64


class LlamaCpp:
    """The adapter; methods are those of Engine, with plain JSON in and out."""

    def load(
        self, path: str, *, tokenizer_only: bool, context: int, threads: int | None, **_: object
    ) -> dict[str, Any]:
        """Start the server; the fields of EngineFacts. Other options are not needed here."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = TOKENIZER_CONTEXT if tokenizer_only else context
        params.n_parallel, params.port, params.use_jinja, params.verbosity = 1, 0, True, 0
        # No warm-up run, no shrinking to the memory there is, no continuation of a last assistant turn.
        params.warmup, params.fit_params, params.prefill_assistant, params.ui = False, False, False, False
        params.cache_ram_mib = 0
        if threads is not None:
            params.cpuparams.n_threads = threads
        self._server = xllamacpp.Server(params)
        self._address = urllib.parse.urlsplit(self._server.listening_address)
        props = self._ask("GET", "/props")
        self._bos = props.get("bos_token") or ""
        self._adds_bos = self._adds(self._bos)
        models = self._ask("GET", "/v1/models")
        return {
            "kind": "llama.cpp",
            "version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
            "model": path,
            "bos": props.get("bos_token") or None,
            "eos": props.get("eos_token") or None,
            "adds_bos": self._adds_bos,
            "vocabulary": int(models["data"][0]["meta"]["n_vocab"]),
        }

    def _adds(self, bos: str) -> bool:
        """Whether BOS comes before plain text."""
        first = self._tokens(bos, False, True) if bos else []
        plain, added = (self._tokens("a", add_special, True)[:1] for add_special in (False, True))
        return added != plain and added == first

    def tokenize(self, texts: list[str], *, add_special: bool, parse_special: bool) -> list[list[int]]:
        """Engine.tokenize."""
        return [self._tokens(text, add_special, parse_special) for text in texts]

    def detokenize(self, ids: list[list[int]]) -> list[str]:
        """Engine.detokenize."""
        return [self._ask("POST", "/detokenize", {"tokens": run})["content"] for run in ids]

    def apply_template(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Engine.apply_template; tokens as the server's chat endpoint makes them (it adds and parses special ones)."""
        results: list[dict[str, Any]] = []
        for request in requests:
            body = {
                "messages": request["messages"],
                "add_generation_prompt": request["add_generation_prompt"],
                "chat_template_kwargs": request["variables"],
                **({"tools": request["tools"]} if request["tools"] else {}),
            }
            try:
                text = self._ask("POST", "/apply-template", body)["prompt"]
            except ServerError as error:
                results.append({"text": "", "ids": [], "error": str(error)})
                continue
            ids = self._tokens(text, True, True)
            results.append({"text": (self._bos if self._adds_bos else "") + text, "ids": ids, "error": None})
        return results

    def next_token_logprobs(self, prompts: list[list[int]], *, top: int) -> list[dict[str, Any]]:
        """Engine.next_token_logprobs.

        The server leaves the probabilities out where the token that it chose ends within a UTF-8 character
        (process_token of tools/server). It is made to choose a letter: the bias changes its choice, not the
        probabilities, which are those of the plain logits.
        """
        letter = [[self._tokens("a", False, False)[-1], 1000.0]]
        results = []
        for prompt in prompts:
            answer = self._complete(prompt, 1, n_probs=top, logit_bias=letter)
            best = answer["completion_probabilities"][0]["top_logprobs"]
            results.append({"ids": [item["id"] for item in best], "logprobs": [item["logprob"] for item in best]})
        return results

    def generate_greedy(self, prompts: list[list[int]], *, max_tokens: int) -> list[dict[str, Any]]:
        """Engine.generate_greedy."""
        results = []
        for prompt in prompts:
            answer = self._complete(prompt, max_tokens, return_tokens=True)
            text = self._ask("POST", "/detokenize", {"tokens": answer["tokens"]})["content"]
            results.append({"ids": answer["tokens"], "text": text, "stopped": answer["stop_type"] == "eos"})
        return results

    def _complete(self, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
        """/completion with the samplers off, whatever defaults the file asks for."""
        greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "repeat_penalty": 1.0, "dry_multiplier": 0.0}
        body = {"prompt": prompt, "n_predict": tokens, "cache_prompt": False, **greedy, **more}
        answer: dict[str, Any] = self._ask("POST", "/completion", body)
        return answer

    def _tokens(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(number) for number in self._ask("POST", "/tokenize", body)["tokens"]]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        # A connection to each request: the server closes idle ones, and http.client knows of no proxy to go through.
        connection = http.client.HTTPConnection(self._address.hostname or "127.0.0.1", self._address.port)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise ServerError(_message_of(content) or f"HTTP status {response.status}")
        return json.loads(content)


class ServerError(Exception):
    """The server's own message."""


def _message_of(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:300]
