"""The verbs that need only a trained model: generate, explain and export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prism_lightning.common.json_text import as_json
from prism_lightning.common.quick_imports import import_decoders
from prism_lightning.common.texts import decode_options


def model_parser(verb: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """A parser of a verb that needs a trained model; `settings` are ArgumentParser's. An epilog is shown as it is."""
    if "epilog" in settings:
        settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m prism_lightning {verb}", description=description, **settings)
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="run directory of a finished fit, or an exported folder"
    )
    return parser


def steered_parser(verb: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """The same, of a verb that applies interventions."""
    parser = model_parser(verb, description, **settings)
    parser.add_argument(
        "--intervention",
        nargs="+",
        default=[],
        metavar="NAME",
        help="apply these of `suppress` and `calibrate`, by name or file; factors of the same prototype are multiplied",
    )
    return parser


def device_options(parser: argparse.ArgumentParser) -> None:
    """Where the model computes, and in which type."""
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N or mps (default auto: CUDA where there is one, otherwise cpu)",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="fp32, or bf16 for the decoder: half its memory; head and prototypes stay fp32 (default fp32)",
    )


def suite_options(parser: argparse.ArgumentParser) -> None:
    """Which tasks, and where their data are."""
    parser.add_argument("--suite", nargs="+", type=Path, required=True, help="YAML files of tasks, see evals/*.yaml")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the suites")
    parser.add_argument("--data_dir", type=Path, help="folder with TASK/SPLIT.jsonl (default: the hub)")


def refuse_below(parser: argparse.ArgumentParser, options: argparse.Namespace, least: int, *names: str) -> None:
    """Exit 2 where a number is smaller than that."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:  # nor is nan
            parser.error(f"--{name} must be " + ("a positive number" if least == 1 else f"at least {least}"))


def generate(arguments: list[str]) -> None:
    """Continue a prompt and print prompt and continuation."""
    parser = steered_parser("generate", "Continue a prompt with a trained model.")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to add at most (default 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (default 0.8)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="sample among this many likeliest tokens (default 50)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sampling, which differs between devices (default 0)"
    )
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="print prompt, continuation and token ids as JSON")
    options = parser.parse_args(arguments)
    decode_options(options, "prompt")
    import_decoders()

    import torch

    from prism_lightning.common.errors import UserError, visible
    from prism_lightning.common.progress import PhaseProgress, TokenCountStreamer
    from prism_lightning.data.token_text import token_text
    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.models.continuation import check_length

    model, tokenizer = load_with(options.ckpt_path, options.intervention, options.device, options.dtype)
    prompt = tokenizer(options.prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    length = prompt["input_ids"].shape[1]
    if length == 0:
        raise UserError("the prompt is empty: give some text by --prompt")
    check_length(model, length + options.max_new_tokens)
    torch.manual_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    with PhaseProgress() as progress:
        out = model.generate(  # type: ignore[misc]
            prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            streamer=TokenCountStreamer(progress, options.max_new_tokens),  # type: ignore[arg-type]
            **(sampling if options.temperature > 0 else {"do_sample": False}),
        )
    ids = out[0, length:].tolist()
    text = token_text(tokenizer, [number for number in ids if number not in tokenizer.all_special_ids])
    if options.json:
        print(as_json({"prompt": options.prompt, "continuation": text, "token_ids": ids}))
    else:
        print(visible(options.prompt + text, keep="\n\t"))


def explain(arguments: list[str]) -> None:
    """Print which prototypes made each token of a text, or of a continuation, likely."""
    parser = steered_parser(
        "explain",
        "Split the logit of each token exactly into one term per active prototype and a residual.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="explain every token of this text")
    what.add_argument("--prompt", help="let the model continue this, and explain each new token")
    parser.add_argument("--max_new_tokens", type=int, default=5, help="with --prompt: tokens to add (default 5)")
    parser.add_argument("--promoted", type=int, default=4, help="promoted tokens shown for each prototype (default 4)")
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    decode_options(options, "text", "prompt")
    import_decoders()

    from prism_lightning.common.console import console
    from prism_lightning.inspection.explain import explain_prompt, explain_text, explanation_table
    from prism_lightning.interventions.intervention import load_with

    model, tokenizer = load_with(options.ckpt_path, options.intervention, options.device, options.dtype)
    if options.text is not None:
        tokens = explain_text(model, tokenizer, options.text, promoted=options.promoted)
    else:
        tokens = explain_prompt(model, tokenizer, options.prompt, options.max_new_tokens, options.promoted)
    if options.json:
        print(as_json([token.as_dict() for token in tokens]))
    else:
        console.print(explanation_table(tokens))


def export(arguments: list[str]) -> None:
    """Write a Hugging Face folder of a model with interventions applied."""
    parser = steered_parser("export", "Write a model with its interventions as a Hugging Face folder of its own.")
    parser.add_argument("--out", type=Path, required=True, help="the folder; it must not exist")
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="fp32, or bf16 for half the size: rounded weights are another model, with indexes and interventions of its"
        " own (default fp32)",
    )
    options = parser.parse_args(arguments)

    from prism_lightning.common.devices import dtype_named
    from prism_lightning.common.errors import UserError
    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.run.model_folder import save_exported

    dtype = dtype_named(options.dtype)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: give a new folder")
    model, tokenizer = load_with(options.ckpt_path, options.intervention)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_exported(model.to(dtype), tokenizer, options.out)  # type: ignore[arg-type]
    print(f"wrote {options.out}: {len({i for s in model.scalings for i in s.factors})} prototypes scaled")
