"""Ask a variant a question in the engine it is made for: a GGUF in llama.cpp, an FP8 checkpoint in transformers.

`python -m examples.speak FILE_OR_FOLDER QUESTION` prints the answer of greedy decoding.
"""

import sys
from pathlib import Path

MAX_TOKENS = 48


def ask_llama_cpp(path: Path, question: str) -> str:
    """The answer of a GGUF file in llama.cpp (package xllamacpp), through its chat endpoint and the file's template."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.port, params.use_jinja, params.n_parallel = 512, 0, True, 1
    params.verbosity = -1
    server = xllamacpp.Server(params)
    answer = server.handle_chat_completions(
        {"messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS, "temperature": 0.0}
    )
    return str(answer["choices"][0]["message"]["content"])


def ask_transformers(folder: Path, question: str) -> str:
    """The answer of a compressed-tensors checkpoint in transformers, with its own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Print the answer."""
    path, question = Path(sys.argv[1]), sys.argv[2]
    answer = ask_llama_cpp(path, question) if path.suffix == ".gguf" else ask_transformers(path, question)
    sys.stdout.write(answer.strip() + "\n")


if __name__ == "__main__":
    main()
