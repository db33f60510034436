"""transformers, with compressed-tensors for FP8 checkpoints; on the CPU unless there is a GPU.

Runs in the child process of validate/engines/process.py. Nothing of a checkpoint is executed: trust_remote_code is off,
weights are safetensors, templates run in Jinja's immutable sandbox.
"""

import contextlib
import json
from pathlib import Path
from typing import Any


class HuggingFaceTokenizer:
    """Tokenizer and chat template of a checkpoint folder, as transformers runs them (and vLLM, which uses it)."""

    def load_tokenizer(self, path: str) -> dict[str, Any]:
        """Load; the fields of EngineFacts."""
        import transformers

        self._folder = Path(path)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        added = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        return {
            "kind": "transformers",
            "version": f"transformers {transformers.__version__}",
            "model": path,
            "bos": self._tokenizer.bos_token,
            "eos": self._tokenizer.eos_token,
            "adds_bos": added[:1] == [self._tokenizer.bos_token_id],
            "vocabulary": len(self._tokenizer),
        }

    def tokenize(self, texts: list[str], *, add_special: bool, parse_special: bool) -> list[list[int]]:
        """Engine.tokenize."""
        if not texts:
            return []
        options = {"add_special_tokens": add_special, "split_special_tokens": not parse_special}
        found: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        return found

    def detokenize(self, ids: list[list[int]]) -> list[str]:
        """Engine.detokenize."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self._tokenizer.decode(run, **options) for run in ids]

    def apply_template(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Engine.apply_template."""
        return [self._apply(request) for request in requests]

    def _apply(self, request: dict[str, Any]) -> dict[str, Any]:
        options = {"tools": request["tools"] or None, "add_generation_prompt": request["add_generation_prompt"]}
        try:
            text = self._tokenizer.apply_chat_template(
                request["messages"], tokenize=False, **options, **request["variables"]
            )
            ids = self._tokenizer.apply_chat_template(
                request["messages"], tokenize=True, return_dict=False, **options, **request["variables"]
            )
        except Exception as error:  # a template may fail in any way
            return {"text": "", "ids": [], "error": f"{type(error).__name__}: {error}"}
        return {"text": text, "ids": list(ids), "error": None}

    def render(
        self, template: str, requests: list[dict[str, Any]], special: dict[str, str] | None
    ) -> list[dict[str, Any]]:
        """EngineProcess.render."""
        known = {name: str(text) for name, text in self._tokenizer.special_tokens_map.items()}
        return _render(template, requests, known if special is None else special)

    def special_tokens(self) -> list[tuple[int, str, bool]]:
        """EngineProcess.special_tokens."""
        added = self._tokenizer.added_tokens_decoder
        return [(int(number), token.content, bool(token.special)) for number, token in sorted(added.items())]

    def stop_ids(self) -> list[int]:
        """eos_token_id of generation_config.json, else of the tokenizer."""
        with contextlib.suppress(OSError, ValueError):
            stop = json.loads((self._folder / "generation_config.json").read_text()).get("eos_token_id")
            if stop is not None:
                ids = list(stop) if isinstance(stop, list) else [stop]
                if not all(type(number) is int for number in ids):
                    raise TypeError(f"eos_token_id of generation_config.json is {stop!r:.100}")
                return ids
        return [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]


class Jinja:
    """Chat templates alone, as transformers renders them: for files that have no tokenizer that it could load."""

    def load(self, path: str, **_: object) -> dict[str, Any]:
        """Nothing is loaded; the fields of EngineFacts."""
        import transformers

        version = f"transformers {transformers.__version__}"
        facts = {"kind": "jinja", "version": version, "model": path, "bos": None, "eos": None}
        return {**facts, "adds_bos": False, "vocabulary": 0}

    def render(self, template: str, requests: list[dict[str, Any]], special: dict[str, str]) -> list[dict[str, Any]]:
        """EngineProcess.render."""
        return _render(template, requests, special)


def _render(template: str, requests: list[dict[str, Any]], special: dict[str, str]) -> list[dict[str, Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    results = []
    for request in requests:
        try:
            texts, _ = render_jinja_template(
                conversations=[request["messages"]],
                tools=request["tools"] or None,
                chat_template=template,
                add_generation_prompt=request["add_generation_prompt"],
                **{**special, **request["variables"]},
            )
            results.append({"text": texts[0], "ids": [], "error": None})
        except Exception as error:  # a template may fail in any way
            results.append({"text": "", "ids": [], "error": f"{type(error).__name__}: {error}"})
    return results


class Transformers(HuggingFaceTokenizer):
    """The adapter; methods are those of Engine, with plain JSON in and out."""

    def load(
        self, path: str, *, tokenizer_only: bool, threads: int | None, dtype: str | None, **_: object
    ) -> dict[str, Any]:
        """Load tokenizer and model; the fields of EngineFacts. Other options are not needed here."""
        facts = self.load_tokenizer(path)
        if tokenizer_only:
            return facts
        import torch
        import transformers

        if threads is not None:
            torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map="cuda" if torch.cuda.is_available() else None,
        ).eval()
        return {**facts, "vocabulary": int(self._model.config.vocab_size)}

    def next_token_logprobs(self, prompts: list[list[int]], *, top: int) -> list[dict[str, Any]]:
        """Engine.next_token_logprobs."""
        import torch

        results = []
        for prompt in prompts:
            with torch.inference_mode():
                inputs = torch.tensor([prompt], device=self._model.device)
                logits = self._model(inputs, logits_to_keep=1).logits[0, -1].float()
                best = torch.log_softmax(logits, -1).topk(min(top, logits.numel()))
            results.append({"ids": best.indices.tolist(), "logprobs": best.values.tolist()})
        return results

    def generate_greedy(self, prompts: list[list[int]], *, max_tokens: int) -> list[dict[str, Any]]:
        """Engine.generate_greedy."""
        import torch

        results, stop = [], self.stop_ids()
        for prompt in prompts:
            with torch.inference_mode():
                inputs = torch.tensor([prompt], device=self._model.device)
                output = self._model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=stop,
                    pad_token_id=stop[0] if stop else 0,
                )
            ids = output[0, len(prompt) :].tolist()
            stopped = bool(ids) and ids[-1] in stop
            ids = ids[:-1] if stopped else ids
            results.append({"ids": ids, "text": self.detokenize([ids])[0], "stopped": stopped})
        return results
