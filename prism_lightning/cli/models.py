"""The verbs that need only a trained model: generate, explain and export."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_lightning.cli.options import device_options, steered_parser
from prism_lightning.common.json_text import as_json
from prism_lightning.common.quick_imports import import_decoders
from prism_lightning.common.texts import decode_options


def _generate_parser() -> argparse.ArgumentParser:
    parser = steered_parser("generate", "Continue a prompt with a trained model.")
    parser.add_argument("--prompt", required=True, help="Text to continue.")
    parser.add_argument(
        "--max_new_tokens", type=int, default=100, help="Largest number of tokens to add (default 100)."
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="Sampling temperature; 0 takes the likeliest token at every position (default 0.8).",
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="Number of likeliest tokens to sample from at each position (default 50)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the sampling; its result differs between devices (default 0)."
    )
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="Print prompt, continuation and token ids as JSON.")
    return parser


def generate(arguments: list[str]) -> None:
    """Print a prompt and its continuation by a trained model."""
    options = _generate_parser().parse_args(arguments)
    decode_options(options, "prompt")
    import_decoders()

    import torch

    from prism_lightning.common.errors import UserError, visible
    from prism_lightning.common.progress import PhaseProgress, TokenCountStreamer
    from prism_lightning.data.token_text import token_text
    from prism_lightning.data.tokenizer import encode
    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.models.continuation import check_length

    model, tokenizer = load_with(options.ckpt_path, options.intervention, options.device, options.dtype)
    if not options.prompt:
        raise UserError("the prompt is empty: give a text by --prompt")
    prompt_1T = torch.tensor([encode(tokenizer, options.prompt)], device=model.device)
    length = prompt_1T.shape[1]
    check_length(model, length + options.max_new_tokens)
    torch.manual_seed(options.seed)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    with PhaseProgress() as progress:
        out = model.generate(  # type: ignore[misc]
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
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
    """Print which prototypes made each token of a text or of a continuation likely."""
    parser = steered_parser(
        "explain",
        "Split the logit of each token exactly into one term per active prototype and a residual.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="Text of which every token is explained.")
    source.add_argument("--prompt", help="Text that the model continues; each new token is explained.")
    parser.add_argument(
        "--max_new_tokens", type=int, default=5, help="Number of tokens to add to --prompt (default 5)."
    )
    parser.add_argument(
        "--promoted", type=int, default=4, help="Number of promoted tokens shown for each prototype (default 4)."
    )
    device_options(parser)
    parser.add_argument("--json", action="store_true", help="Print the explanation as JSON.")
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
    """Write a model with interventions applied as a Hugging Face folder."""
    parser = steered_parser(
        "export",
        "Write a model with its interventions as a Hugging Face folder with a model card. It loads with this package,"
        " and without it by AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).",
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder to write; it must not exist.")
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="Number type of the weights: fp32, or bf16 for half the size. Rounded weights are another model and need"
        " indexes and interventions of their own (default fp32).",
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help="Write the decoder and its head alone, as a model of the decoder's own family: it loads with"
        " AutoModelForCausalLM, without prism_lightning, and gives equal logits.",
    )
    options = parser.parse_args(arguments)

    from prism_lightning.common.devices import dtype_named
    from prism_lightning.common.errors import UserError
    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.models.native import native_model
    from prism_lightning.reporting.model_card import model_card
    from prism_lightning.run.model_folder import save_native, save_shareable

    dtype = dtype_named(options.dtype)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists: give a folder that does not exist")
    model, tokenizer = load_with(options.ckpt_path, options.intervention)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.native:
        native = native_model(model)
        save_native(native.to(dtype), tokenizer, options.out)  # type: ignore[arg-type]
        print(f"wrote {options.out}: {type(native).__name__}, without prototypes")
        return
    card = model_card(model, options.ckpt_path, options.intervention)
    save_shareable(model.to(dtype), tokenizer, options.out, card.text)  # type: ignore[arg-type]
    print(f"wrote {options.out}: {len({i for s in model.scalings for i in s.factors})} prototypes scaled")
