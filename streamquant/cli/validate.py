"""`validate`, `chat-check` and `report`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import streamquant
from streamquant.cli.arguments import (
    AsJson,
    Chunks,
    ComputeDType,
    Context,
    Device,
    Original,
    Scratch,
    Texts,
    Variants,
    forward_setting,
    names_of,
)
from streamquant.cli.console import print_line, print_result, say
from streamquant.cli.progress import console_listener
from streamquant.files.folders import check_working_folder
from streamquant.validate.sections import ANSWER_TOKENS, FOLDER_ENGINES, SKIPPABLE


def validate_command(
    original: Original,
    variants: Variants,
    text: Texts,
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.html and plots.")],
    device: Device = "auto",
    dtype: ComputeDType = None,
    context: Context = 512,
    chunks: Chunks = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not quantize activations, even where the runtime would.")
    ] = False,
    max_mean_kld: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats per token.")] = None,
    max_kld_99_9: Annotated[float | None, typer.Option("--max-kld-99-9", help="Gate: its 99.9th percentile.")] = None,
    min_same_top: Annotated[float | None, typer.Option(help="Gate: share of the same top token, like 0.9.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Gate: perplexity over the original's.")] = None,
    max_errors: Annotated[int, typer.Option(help="Gate: problems of severity error in a variant.")] = 0,
    max_token_mismatches: Annotated[int | None, typer.Option(help="Gate: texts tokenized differently.")] = None,
    max_chat_mismatches: Annotated[int | None, typer.Option(help="Gate: chats rendered differently.")] = None,
    skip: Annotated[str, typer.Option(help=f"Sections to skip, separated by commas: {', '.join(SKIPPABLE)}.")] = "",
    noise: Annotated[
        str, typer.Option(help="Noise floors of the original to measure, separated by commas: dtype, batch.")
    ] = "batch",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for the original's hidden states. Default: in the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no hidden states.")] = False,
    scratch: Scratch = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json for the texts, if ORIGINAL has none (a GGUF).")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest greedy answer.")] = ANSWER_TOKENS,
    engine: Annotated[
        str | None,
        typer.Option(help=f"What runs FP8 folders: {', '.join(FOLDER_ENGINES)}. Default: vLLM if it is installed."),
    ] = None,
) -> None:
    """Compare variants with their original: perplexity, divergence, tokens, chat, engines and answers, as a report.

    If a gate fails, the command names it and exits with code 3. A repeated run reuses the original's hidden states.

    Example: `streamquant validate Hermes-4-14B Hermes-4-14B-Q4_K_M.gguf --text wiki.test.raw --out report`
    """
    from streamquant.validate.gates import failed
    from streamquant.validate.logits.hidden_states import default_cache
    from streamquant.validate.report.console import report_view

    gates = streamquant.Gates(
        max_mean_kld, max_kld_99_9, min_same_top, max_ppl_ratio, max_errors, max_token_mismatches, max_chat_mismatches
    )
    check_working_folder()
    options = streamquant.ValidationOptions(
        texts=tuple(text),
        setting=replace(forward_setting(device, dtype, scratch), weights_only=weights_only),
        context=context,
        chunks=chunks,
        skip=frozenset(names_of("--skip", skip, SKIPPABLE)),
        noise=names_of("--noise", noise, ("dtype", "batch")),  # type: ignore[arg-type] # those are its names
        gates=gates,
        cache=None if no_cache else cache or default_cache(),
        tokenizer=tokenizer,
        answer_tokens=answer_tokens,
        engine=engine,  # type: ignore[arg-type] # the record refuses other names
        command=("streamquant", *sys.argv[1:]),
    )
    with console_listener("run the same command again; it uses what is in the cache") as listener:
        report = streamquant.validate(original, variants, options, out=out, listener=listener)
    print_result(report_view(report), is_kept=True)
    print_line(f"report: {out / 'report.html'}")
    wrong = failed(report.gate_results)
    for gate in wrong:
        say(f"gate failed: {gate}")
    if wrong:
        raise typer.Exit(streamquant.GateFailedError.exit_code)


def chat_check_command(original: Original, variants: Variants, as_json: AsJson = False) -> None:
    """Compare tokens and chat templates of variants with the original's, in the engines. No weight is read.

    The exit code is 3 if one differs. Example: `streamquant chat-check Hermes-4-14B variants/*-GGUF/*.gguf`
    """
    from streamquant.validate.report.console import chat_json, chat_view

    check_working_folder()
    with console_listener("run the same command again; it uses what is in the cache") as listener:
        found = streamquant.chat_check(original, variants, listener=listener)
    print_result(chat_json(found) if as_json else chat_view(found))
    if found.errors:
        raise typer.Exit(streamquant.GateFailedError.exit_code)


def report_command(
    report: Annotated[Path, typer.Argument(help="Folder of a report, or its report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages. Default: that of report.json.")] = None,
) -> None:
    """Render report.md, report.html and plots again from report.json. Example: `streamquant report report`."""
    from streamquant.files.writing import check_writable

    if out is not None:
        check_writable(out, try_it=True)
    found = streamquant.read_report(report)
    folder = out or (report if report.is_dir() else report.parent)
    for path in streamquant.write_pages(found, folder):
        print_line(path)
