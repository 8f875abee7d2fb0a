"""The verbs that share models by the Hugging Face hub: push and pull."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from prism_lightning.cli.options import steered_parser
from prism_lightning.common.quick_imports import import_decoders


def push(arguments: list[str]) -> None:
    """Show what would be sent to the hub, and send it after the user's word."""
    parser = steered_parser(
        "push",
        "Send a model with its card to the Hugging Face hub. It prints what would be sent, and sends it after a yes"
        " only. The token is that of `hf auth login` or of the variable HF_TOKEN.",
    )
    parser.add_argument(
        "--repo", required=True, metavar="USER/NAME", help="Repository to write; it is made if missing."
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private (default: public).")
    parser.add_argument("--yes", action="store_true", help="Send without asking.")
    options = parser.parse_args(arguments)

    from prism_lightning.common.errors import UserError
    from prism_lightning.run.hub import check_repository, send_model

    check_repository(options.repo, "--repo")
    import_decoders()

    from prism_lightning.interventions.intervention import load_with
    from prism_lightning.reporting.model_card import model_card
    from prism_lightning.run.model_folder import save_shareable

    model, tokenizer = load_with(options.ckpt_path, options.intervention)
    card = model_card(model, options.ckpt_path, options.intervention, options.repo)
    with tempfile.TemporaryDirectory(prefix="prism_push_") as temporary:
        folder = Path(temporary) / "model"
        save_shareable(model, tokenizer, folder, card.text)
        _print_plan(folder, options, card.summary)
        if not options.yes and not sys.stdin.isatty():
            raise UserError("nothing was sent, since there is no terminal to ask on: run the same command with --yes")
        if options.yes or _agreed():
            print(f"sent: {send_model(folder, options.repo, options.private)}")
        else:
            print("nothing was sent")


def _agreed() -> bool:
    try:
        return input("Send this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _print_plan(folder: Path, options: argparse.Namespace, summary: list[str]) -> None:
    files = sorted(folder.iterdir())
    print(f"to send: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    for path in files:
        print(f"  {path.name:<36} {path.stat().st_size:>15,} bytes")
    access = "private" if options.private else "public"
    print(f"to: {options.repo} on the Hugging Face hub, {access} if it is new; files of the same names are replaced")
    for line in summary:
        print(f"  {line}")
    sys.stdout.flush()


def pull(arguments: list[str]) -> None:
    """Download a PRISM model from the hub into a run directory."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_lightning pull",
        description="Download a PRISM model from the Hugging Face hub, for every verb with --ckpt_path. Weights in"
        " safetensors, settings, tokenizer and card are taken; code is neither taken nor executed.",
    )
    parser.add_argument("repo", metavar="USER/NAME", help="Repository on the hub.")
    parser.add_argument("--out", type=Path, required=True, help="Run directory to make; it must not exist.")
    parser.add_argument("--revision", help="Branch, tag or commit (default: the main branch).")
    options = parser.parse_args(arguments)

    from prism_lightning.run.hub import check_repository, fetch_model

    check_repository(options.repo, "repository")
    files = fetch_model(options.repo, options.revision, options.out)
    print(f"wrote {options.out}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    print(f"try: python -m prism_lightning explain --ckpt_path {options.out} --text 'Once upon a time'")
