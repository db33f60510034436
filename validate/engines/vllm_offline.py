"""vLLM's offline engine, for FP8 checkpoints as they are served; an extra, on a GPU.

Written from vLLM's public API (LLM, SamplingParams, TokensPrompt) and NOT RUN by this project's tests: vLLM needs a
GPU and a build of torch that the tests do not have. Tokenizer and template are transformers', as they are in vLLM.
"""

import importlib.metadata
from typing import Any

from streamquant.validate.engines.hugging_face import HuggingFaceTokenizer


class Vllm(HuggingFaceTokenizer):
    """The adapter; methods are those of Engine, with plain JSON in and out."""

    def load(self, path: str, *, tokenizer_only: bool, context: int, dtype: str | None, **_: object) -> dict[str, Any]:
        """Load tokenizer and model; the fields of EngineFacts. Other options are not needed here."""
        import vllm

        facts = self.load_tokenizer(path) | {"kind": "vllm", "version": f"vllm {importlib.metadata.version('vllm')}"}
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
