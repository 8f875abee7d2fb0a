"""Record what every verb does on a tiny run, so that two commits can be compared.

python tests/behaviour_record.py record RECORD.json     the working tree's behaviour, in about five minutes
python tests/behaviour_record.py compare OLD.json NEW.json

Weights, index shards and predictions are compared byte for byte, JSON value by value, exit codes exactly. Durations,
rates, commits and paths are left out. Texts for people (tables, help, Markdown) may be reworded by a redesign: what
changed in them is listed and does not count as a difference.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BYTES = {".safetensors", ".npy", ".bin"}
TEXTS = {".md", ".html", ".txt", ".jinja"}
# Values that no two runs share.
VARYING = re.compile(
    r"(?i)seconds|commit|per_second|peak_memory|^time|_time$|^command$|^created|^date|packages|machine|python|"
    r"^versions?$|hours|started|mfu|hostname|^host$|^pid$|fingerprint_time|eta"
)
# Keys of JSON files that a commit renamed: the old record is read with the new names.
RENAMED_KEYS: dict[str, str] = {}
HELP = (
    "fit",
    "index",
    "generate",
    "explain",
    "export",
    "attribute",
    "curvature",
    "prototypes",
    "suppress",
    "calibrate",
)
HELP += ("evaluate", "sweep", "report")
SUITE = "tasks: {continuation: {kind: continuation, metric: acc, chance: 0.25, context: 12, continuation: 4}}\n"
SMALL_QUICKSTART = (
    *("--data.vocab_size", "300", "--data.block_size", "32", "--data.batch_size", "8", "--data.micro_batch_size", "4"),
    *("--data.validation_blocks", "16", "--trainer.max_steps", "30", "--trainer.val_check_interval", "15"),
    *("--model.backbone.n_layer", "1", "--model.backbone.n_embd", "32", "--model.backbone.n_head", "2"),
)


def commands(work: Path) -> list[tuple[str, list[str]]]:
    """Name and arguments of every command, in order: later ones use what earlier ones made."""
    run, suite = str(work / "run"), str(work / "suite.yaml")
    data = ["--data.path", f"{work}/pieces.jsonl", "--data.cache_dir", f"{work}/cache"]
    steps = ["--trainer.max_steps", "150", "--trainer.val_check_interval", "50", "--model.learning_rate", "5e-3"]
    recipe = ["--config", str(ROOT / "tests" / "tiny.yaml"), *data, *steps]
    on_run = ["--ckpt_path", run]
    coarse = ["--index.prototypes", "256"]
    small = ["--tokens", "20000", "--prompts", "30", "--new_tokens", "12", "--draws", "2"]
    dense = ["--config", str(ROOT / "recipes/quickstart_dense.yaml"), *data, *SMALL_QUICKSTART]
    asked = [*on_run, "--text", "import os", "--json"]
    return [
        ("fit", ["fit", *recipe, "--run.dir", run]),
        ("fit again", ["fit", *recipe, "--run.dir", run]),
        ("fit of the dense twin", ["fit", *dense, "--run.dir", f"{work}/dense"]),
        ("fit of another recipe", ["fit", *recipe, "--run.dir", run, "--model.warmup_steps", "5"]),
        ("validate", ["validate", *recipe, "--run.dir", run]),
        ("predict", ["predict", *recipe, "--run.dir", run]),
        ("print_config", ["fit", *recipe, "--run.dir", run, "--print_config"]),
        ("index", ["index", *recipe, "--run.dir", run, "--index.prototypes", "256", "--index.fit_steps", "20"]),
        (
            "index in hidden",
            [
                "index",
                *recipe,
                "--run.dir",
                run,
                "--index.space",
                "hidden",
                *coarse,
                "--index.dir",
                f"{work}/h",
            ],
        ),
        (
            "index of the model",
            ["index", *recipe, "--run.dir", run, "--index.dictionary", "model", "--index.dir", f"{work}/m"],
        ),
        ("generate", ["generate", *on_run, "--prompt", "def f(", "--max_new_tokens", "8", "--json"]),
        (
            "generate sampled",
            ["generate", *on_run, "--prompt", "def f(", "--max_new_tokens", "8", "--temperature", "1", "--json"],
        ),
        ("explain", ["explain", *asked]),
        ("explain table", ["explain", *on_run, "--text", "import os"]),
        ("attribute", ["attribute", *asked, "--top", "5"]),
        ("attribute opposing", ["attribute", *asked, "--top", "3", "--opposing"]),
        ("attribute prompt", ["attribute", *on_run, "--prompt", "import os", "--max_new_tokens", "2", "--json"]),
        ("attribute why", ["attribute", *on_run, "--prompt", "import", "--why", " o", "--rather_than", " s", "--json"]),
        ("attribute table", ["attribute", *on_run, "--text", "import os", "--top", "2"]),
        ("attribute in hidden", ["attribute", *asked, "--index", f"{work}/h"]),
        ("attribute of the model", ["attribute", *asked, "--index", f"{work}/m"]),
        ("attribute questions", ["attribute", *on_run, "--queries", f"{work}/questions.jsonl", "--json"]),
        ("prototypes", ["prototypes", *on_run, "--json", "--top", "3"]),
        ("prototypes table", ["prototypes", *on_run, "--id", "3"]),
        ("curvature", ["curvature", *on_run, "--tokens", "4096", "--sample", "200"]),
        ("suppress", ["suppress", *on_run, "--words", "(", "--name", "no_calls", *small]),
        ("suppress prototypes", ["suppress", *on_run, "--id", "3", "9", "--words", "(", "--name", "two", *small]),
        (
            "calibrate",
            [
                "calibrate",
                *on_run,
                "--suite",
                f"{work}/piqa.yaml",
                "--data_dir",
                f"{work}/items",
                "--name",
                "c",
                "--permutations",
                "2",
            ],
        ),
        (
            "generate with an intervention",
            [
                "generate",
                *on_run,
                "--intervention",
                "no_calls",
                "--prompt",
                "def f(",
                "--max_new_tokens",
                "8",
                "--json",
            ],
        ),
        ("explain with an intervention", ["explain", *asked, "--intervention", "no_calls"]),
        ("evaluate", ["evaluate", *on_run, "--suite", suite, "--limit", "20", "--json"]),
        (
            "evaluate against",
            ["evaluate", *on_run, "--intervention", "no_calls", "--against", run, "--suite", suite, "--limit", "20"],
        ),
        ("export", ["export", *on_run, "--intervention", "no_calls", "--out", f"{work}/exported"]),
        ("evaluate the dense twin", ["evaluate", "--ckpt_path", f"{work}/dense", "--suite", suite, "--limit", "20"]),
        ("report", ["report", "--runs", run, f"{work}/dense", "--out", f"{work}/report"]),
        ("sweep run", ["sweep", "run", "--config", f"{work}/sweep.yaml"]),
        ("sweep status", ["sweep", "status", "--config", f"{work}/sweep.yaml"]),
        ("sweep results", ["sweep", "results", "--config", f"{work}/sweep.yaml", "--out", f"{work}/ladder"]),
        ("sweep plan", ["sweep", "plan", "--config", str(ROOT / "recipes/sweeps/ladder_cpu.yaml"), "--commands"]),
        *((f"{verb} --help", [verb, "--help"]) for verb in HELP),
        ("--help", ["--help"]),
        ("unknown verb", ["expalin"]),
        ("unknown setting", ["fit", *recipe, "--run.dir", f"{work}/none", "--model.num_prototype", "3"]),
        ("no model", ["explain", "--ckpt_path", f"{work}/none", "--text", "x"]),
        ("no data", ["fit", *recipe, "--run.dir", f"{work}/none", "--data.path", f"{work}/none/*.txt"]),
        ("bad words", ["suppress", *on_run, "--words", "zyxwv", "--name", "x", *small]),
    ]


def prepare(work: Path) -> None:
    """Real text in short documents, items and questions: always the same for one Python."""
    sources = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    chosen = sorted(path for path in sources if 4_000 < path.stat().st_size < 30_000)[:40]
    texts = [" ".join(path.read_bytes().decode("utf-8", "replace").split()) for path in chosen]
    documents = [text[start : start + 300] for text in texts for start in range(0, min(len(text), 6000) - 300, 300)]
    (work / "pieces.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (work / "suite.yaml").write_text(SUITE)
    (work / "piqa.yaml").write_text("tasks: {piqa: {metric: acc_norm, chance: 0.5}}\n")
    settings = {"data.path": f"{work}/pieces.jsonl", "data.cache_dir": f"{work}/cache", "data.seed": 0}
    sweep = {"dir": f"{work}/sweep", "recipe": str(ROOT / "tests/tiny.yaml"), "variant": ["prism"], "seed": [0, 1]}
    (work / "sweep.yaml").write_text(json.dumps(sweep | {"settings": settings, "suites": ["suite.yaml"]}))
    pieces = [text[start : start + 200] for text in texts for start in (0, 400, 800, 1200)]
    rows = [
        {"goal": piece[:80], "sol1": piece[80:140], "sol2": pieces[number - 1][80:140], "label": number % 2}
        for number, piece in enumerate(pieces)
    ]
    (work / "items" / "piqa").mkdir(parents=True)
    for split, part in (("train", rows[:100]), ("validation", rows[100:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (work / "items" / "piqa" / f"{split}.jsonl").write_text(lines)
    questions = [{"text": "import os"}, {"prompt": "import", "why": " o", "rather_than": " s"}]
    (work / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def plain(text: str, work: Path) -> str:
    """A text without what varies: paths of this record, durations, rates, commits and package versions."""
    text = text.replace(str(work), "WORK").replace(str(ROOT), "ROOT")
    text = re.sub(r"\b[0-9a-f]{40}(\+changes)?\b", "COMMIT", text)
    text = re.sub(r"[\d,]+(\.\d+)? ?(tokens/s|it/s)", r"RATE \2", text)
    text = re.sub(r"<svg.*?</svg>", "FIGURE", text, flags=re.S)
    text = re.sub(r"\d+:\d\d:\d\d", "CLOCK", text)
    text = re.sub(r"\b[\d,]+(\.\d+)? (s|ms|min|h|GiB|MB/s)\b", "DURATION", text)
    text = re.sub(r'"(\w*seconds|tokens_per_second|peak_memory_gib)": [\d.]+', r'"\1": NUMBER', text)
    return re.sub(r"\b20\d\d-\d\d-\d\d[T \d:.+]*", "DATE", text)


def without_varying(value: Any, work: Path) -> Any:
    """JSON without what varies."""
    if isinstance(value, dict):
        return {key: without_varying(entry, work) for key, entry in value.items() if not VARYING.search(key)}
    if isinstance(value, list):
        return [without_varying(entry, work) for entry in value]
    return plain(value, work) if isinstance(value, str) else value


def parsed(text: str, work: Path) -> Any:
    """JSON or JSON lines as values; anything else as a text."""
    try:
        return {"json": without_varying(json.loads(text), work)}
    except ValueError:
        pass
    try:
        return {"json": [without_varying(json.loads(line), work) for line in text.splitlines() if line.strip()]}
    except ValueError:
        return {"text": plain(text, work)}


def content(path: Path, work: Path) -> Any:
    """What a file holds, as it is compared."""
    if path.suffix in BYTES:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.suffix == ".ckpt":  # the rest of the archive holds durations
        with zipfile.ZipFile(path) as archive:
            tensors = sorted(name for name in archive.namelist() if "/data/" in name)
            return {"tensors": hashlib.sha256(b"".join(archive.read(name) for name in tensors)).hexdigest()}
    if path.suffix in {".json", ".jsonl"}:
        return parsed(path.read_text(), work)
    if path.suffix == ".yaml":
        return {"json": without_varying(yaml.safe_load(path.read_text()), work)}
    if path.suffix in TEXTS:
        return {"text": plain(path.read_text(errors="replace"), work)}
    return {"is": "there"}


def record(out: Path) -> int:
    """Run everything and write the record."""
    entries, known = {}, {}
    variables = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    # Paths stand in prepared data and cut in tables, so every record is made in the same folder.
    work = Path(tempfile.gettempdir()).resolve() / "prism_behaviour_record"
    work.mkdir()  # fails where another record is being made
    try:
        prepare(work)
        for title, arguments in commands(work):
            words = [sys.executable, "-m", "prism_lightning", *arguments]
            result = subprocess.run(words, cwd=work, capture_output=True, text=True, env=variables)
            print(f"exit {result.returncode}  {title}", flush=True)
            files = {}
            for path in sorted(p for p in work.rglob("*") if p.is_file()):
                stamp = (path.stat().st_mtime_ns, path.stat().st_size)
                if known.get(path) != stamp:
                    known[path] = stamp
                    files[plain(str(path), work)] = content(path, work)
            entries[title] = {
                "exit": result.returncode,
                "stdout": parsed(result.stdout, work),
                "stderr": {"text": plain(result.stderr, work)},
                "files": files,
            }
    finally:
        shutil.rmtree(work)
    out.write_text(json.dumps(entries, indent=1))
    return 0


def renamed(value: Any) -> Any:
    """An old record's JSON with today's keys."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): renamed(entry) for key, entry in value.items()}
    return [renamed(entry) for entry in value] if isinstance(value, list) else value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its path."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, entry in pairs for path, leaf in flat(entry, f"{prefix}/{key}").items()}
    return {prefix: value}


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print every difference; 1 where one counts."""
    differences, texts = [], []
    before, after = flat(renamed(old)), flat(new)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path):
            continue
        if path.endswith("/text") and path in before and path in after:
            texts.append(path)
            lines = (str(text[path]).splitlines() for text in (before, after))
            print(f"reworded {path}", *difflib.unified_diff(*lines, lineterm="", n=0), sep="\n  ")
        else:
            differences.append(path)
            print(f"DIFFERENT {path}: {before.get(path, 'absent')!r} -> {after.get(path, 'absent')!r}")
    print(f"{len(before)} values, {len(differences)} differences, {len(texts)} texts reworded")
    return int(bool(differences))


def main() -> int:
    """The exit code."""
    if len(sys.argv) == 3 and sys.argv[1] == "record":
        return record(Path(sys.argv[2]).resolve())
    if len(sys.argv) == 4 and sys.argv[1] == "compare":
        old, new = (json.loads(Path(name).read_text()) for name in sys.argv[2:])
        return compare(old, new)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
