"""The verb evaluate prints tables and JSON, resumes tasks, pairs differences and refuses wrong arguments."""

import json

import pytest
import torch
from support.processes import fit
from support.runs import ROOT, in_run, tiny_arguments

from prism_lightning.evaluation.suites import SuiteTask
from prism_lightning.evaluation.tasks import why_fewer
from prism_lightning.run.model_folder import load_exported
from prism_lightning.run.training_data import data_of


@pytest.fixture(scope="module")
def runs(corpus, cache, tmp_path_factory):
    """Two finished tiny runs of other seeds, and a suite of small tasks on their validation documents."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = tiny_arguments(folder / "one", corpus, cache)
    fit(arguments)
    fit(in_run(arguments, folder / "two", "--seed_everything", "7", "--data.seed", "0"))
    suite = folder / "suite.yaml"
    suite.write_text(
        "tasks:\n"
        "  continuation: {kind: continuation, metric: acc, chance: 0.25, context: 20, continuation: 6}\n"
        "  validation: {kind: validation, metric: bits_per_byte, documents: 2}\n"
    )
    return folder / "one", folder / "two", suite


def test_evaluate_prints_a_table_and_keeps_results(cli, runs):
    run, _, suite = runs
    out = cli("evaluate", "--ckpt_path", run, "--suite", suite, check=0).stdout
    assert "continuation" in out and "bits_per_byte" in out and "0.250" in out and "±" in out
    kept = json.loads((run / "evaluation/continuation.json").read_text())
    lines = (run / "evaluation/continuation.samples.jsonl").read_text().splitlines()
    assert kept["documents"] == len(lines) and kept["requests"] == 4 * len(lines)
    values = [json.loads(line)["acc"] for line in lines]
    assert kept["metrics"]["acc"] == pytest.approx(sum(values) / len(values))


def test_a_finished_task_is_not_run_again_and_another_limit_is(cli, runs, monkeypatch):
    run, _, suite = runs
    cli("evaluate", "--ckpt_path", run, "--suite", suite, check=0)
    before = (run / "evaluation/continuation.json").stat().st_mtime_ns
    cli("evaluate", "--ckpt_path", run, "--suite", suite, check=0)
    assert (run / "evaluation/continuation.json").stat().st_mtime_ns == before
    cli("evaluate", "--ckpt_path", run, "--suite", suite, "--tasks", "continuation", "--limit", "2", check=0)
    assert json.loads((run / "evaluation/continuation.json").read_text())["documents"] == 2


def test_differences_are_paired(cli, runs):
    run, other_run, suite = runs
    arguments = ["evaluate", "--ckpt_path", run, "--against", other_run, "--suite", suite, "--tasks", "continuation"]
    content = json.loads(cli(*arguments, "--json", check=0).stdout)
    first, second = (results[0]["metrics"]["acc"] for results in content["results"])
    assert content["differences"][0]["value"] == pytest.approx(first - second)
    assert "one - two, item by item" in cli(*arguments, check=0).stdout


def test_only_accuracies_are_compared_by_document(cli, runs):
    """Bits per byte are a ratio of sums: no document has a share of them."""
    run, other_run, suite = runs
    content = json.loads(
        cli("evaluate", "--ckpt_path", run, "--against", other_run, "--suite", suite, "--json", check=0).stdout
    )
    assert [result["task"] for result in content["results"][1]] == ["continuation", "validation"]
    assert [difference["task"] for difference in content["differences"]] == ["continuation"]


def test_fewer_items_than_asked_are_told_with_the_reason(cli, runs):
    run, _, suite = runs
    arguments = ["evaluate", "--ckpt_path", run, "--suite", suite]
    result = cli(*arguments, "--json", check=0)
    documents = {result["task"]: result["documents"] for result in json.loads(result.stdout)["results"][0]}
    lines = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    texts = data_of(run).validation.texts()
    long = sum(len(text.split(" ")) >= 26 for text in texts)
    assert documents["continuation"] == long < 400 and documents["validation"] == 2
    assert lines == [
        f"note: {run} continuation: {long} of 400 items: of {len(texts)} validation documents {long} have the 26 words"
        " that a question takes"
    ]
    again = cli(*arguments, "--limit", "50", check=0).stderr
    assert f"note: {run} validation: 2 of 50 items: the suite's setting `documents` is 2\n" in again
    assert "note:" not in cli(*arguments, "--limit", "2", check=0).stderr


def test_why_a_task_has_fewer_documents():
    texts = ["a b c", "a b", "a"]
    question = SuiteTask("acc", 0.25, "continuation", documents=9, context=1, continuation=1)
    assert why_fewer(question, 2, 2, lambda: texts) is None
    expected = "of 3 training documents 2 have the 2 words that a question takes"
    assert why_fewer(question, 2, 9, lambda: texts, "training") == expected
    assert why_fewer(SuiteTask("bits_per_byte", kind="validation"), 3, 400, lambda: texts) == (
        "the run's validation split has no more"
    )
    assert why_fewer(SuiteTask("acc", 0.25), 3, 5, lambda: texts) == "its data have no more"


def test_the_harness_own_command_line_knows_the_bridge(runs, tmp_path, cli):
    """A task of local files, as the harness's script takes it, scored by hand."""
    run, _, _ = runs
    words = ["self", "return", "import", "class", "None", "True", "raise", "yield"]
    items = [{"context": f"def {word}(x):", "choices": words[:4], "label": n % 4} for n, word in enumerate(words)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "local.yaml").write_text(
        f"task: local_items\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = ["lm_eval", "run", "--model", "prism", "--model_args", f"checkpoint={run}", "--tasks", "local_items"]
    cli(*arguments, "--include_path", tmp_path, "--output_path", tmp_path / "out", check=0)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    model, tokenizer = load_exported(run)

    def score(context, choice):
        ids, whole = (tokenizer(text)["input_ids"] for text in (context, f"{context} {choice}"))
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logits[at - 1, whole[at]].item() for at in range(len(ids), len(whole)))

    best = [max(range(4), key=lambda n: score(item["context"], item["choices"][n])) for item in items]
    right = sum(choice == item["label"] for choice, item in zip(best, items, strict=True))
    assert json.loads(path.read_text())["results"]["local_items"]["acc,none"] == pytest.approx(right / len(items))


def test_the_harness_finds_the_bridge_by_its_name(runs):
    import lm_eval
    from lm_eval.api.registry import get_model

    from prism_lightning.evaluation.harness import PrismHarnessModel

    assert get_model("prism") is PrismHarnessModel and lm_eval.__version__
    model = PrismHarnessModel.create_from_arg_string(f"checkpoint={runs[0]},batch_tokens=512")
    assert model.batch_tokens == 512 and model.max_length == model.prism.config.context_length


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "nowhere.yaml"], "no such file"),
        (["--suite", ROOT / "evals/downstream.yaml", "--data_dir", "nowhere"], "put the data of task hellaswag there"),
        (["--suite", ROOT / "evals/downstream.yaml", "--tasks", "piqqa"], "did you mean piqa"),
        (["--suite", ROOT / "evals/continuation.yaml", "--limit", "0"], "--limit must be"),
        (["--suite", ROOT / "evals/continuation.yaml", "--against", "nowhere"], "holds no exported model"),
    ],
)
def test_wrong_questions_are_refused_in_words(cli, runs, arguments, words):
    result = cli("evaluate", "--ckpt_path", runs[0], *arguments)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
