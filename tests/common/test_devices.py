"""`--device` and `--dtype` choose where and in which type every verb computes, tested on a pretended device."""

import json

import pytest
import torch
from safetensors import safe_open
from support import device_cases
from support.device_cases import ROUNDED, VERBS, answer, differences, headline
from support.pretended_cuda import pretended_cuda

from prism_lightning.common.devices import check_float64, device_named, dtype_named
from prism_lightning.common.errors import UserError
from prism_lightning.models import decompose
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported

trained, runs = device_cases.trained, device_cases.runs  # fixtures
ORDER = ("index", *VERBS)  # `attribute` asks the index


@pytest.fixture(scope="module")
def plain():
    """Answers of the verbs on the CPU, by verb."""
    return {}


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has so many CUDA devices."""

    def pretend_devices(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend_devices


# Names


def test_auto_is_cuda_where_there_is_one(gpus):
    gpus(0)
    assert device_named("auto") == torch.device("cpu")
    gpus(2)
    assert device_named("auto") == torch.device("cuda", 0) and device_named("cpu") == torch.device("cpu")
    assert device_named("cuda:1") == torch.device("cuda", 1)


def test_processes_take_the_devices_in_turn_unless_one_is_named(gpus):
    gpus(2)
    assert [device_named("auto", rank).index for rank in range(3)] == [0, 1, 0]
    assert [device_named("cuda:1", rank).index for rank in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("gpu", 1, "--device gpu: give auto, cpu, cuda, cuda:N or mps"),
        ("cuda:", 1, "--device cuda:: give auto"),
        ("cuda:-1", 1, "--device cuda:-1: give auto"),
        ("cuda:3", 1, "--device cuda:3: this machine has 1 CUDA device: give cuda:0"),
        ("cuda:4", 4, "this machine has 4 CUDA devices: give cuda:0 to cuda:3"),
        ("cuda", 0, "finds no CUDA device here: give --device cpu"),
        ("cuda:0", 0, "finds no CUDA device here: give --device cpu"),
        ("mps", 0, "finds no Apple GPU here: give --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_one_that_is(gpus, monkeypatch, name, count, message):
    gpus(count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        device_named(name)
    assert message in str(error.value) and len(error.value.problems) == 1


def test_other_types_are_refused():
    assert (dtype_named("fp32"), dtype_named("bf16")) == (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match="--dtype fp16: give fp32 or bf16"):
        dtype_named("fp16")


def test_what_needs_float64_is_refused_on_mps_alone():
    check_float64(torch.device("cuda", 0), "x")
    with pytest.raises(UserError, match="--index.space hidden needs float64"):
        check_float64(torch.device("mps"), "--index.space hidden")


@pytest.mark.parametrize("verb", [*ORDER, "export"])
def test_help_says_what_there_is(cli, verb):
    page = " ".join(cli(verb, "--help", check=0).stdout.split())
    assert "--dtype" in page and "fp32, or bf16" in page
    assert ("cpu, cuda, cuda:N or mps" in page) == (verb != "export")


@pytest.mark.parametrize("place", [("--device", "gpu"), ("--dtype", "fp16")])
def test_wrong_places_are_one_line(trained, cli, place):
    run, arguments = trained
    for line in (("generate", "--ckpt_path", run, "--prompt", "x"), ("index", *arguments)):
        result = cli(*line, *place)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: {place[0]} {place[1]}: give ")


# Another device


def test_the_pretended_device_refuses_what_a_real_one_does(trained):
    ids = torch.tensor([[1, 2, 3]])
    with pretended_cuda() as device:
        model, _ = load_exported(trained[0], "cuda")
        assert model.device == device and model.lm_head.weight.is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            decompose(model, ids)
        with pytest.raises(RuntimeError, match="numpy"):
            model.lm_head.weight.detach().numpy()
        on_device = decompose(model, ids.to("cuda")).total_BT.cpu()
    torch.testing.assert_close(on_device, decompose(load_exported(trained[0])[0], ids).total_BT)


@pytest.mark.parametrize("verb", ORDER)
def test_every_verb_says_the_same_on_another_device(trained, runs, plain, cli, verb):
    plain[verb] = answer(cli, runs["cpu"], trained[1], verb, "--device", "cpu")
    with pretended_cuda():
        on_device = answer(cli, runs["cuda"], trained[1], verb, "--device", "cuda")
    assert differences(plain[verb], on_device, 1e-5) == []


def test_an_index_of_hidden_states_is_the_same_on_another_device(trained, runs, cli):
    run, arguments = trained
    quick = ("--index.fit_tokens", "8192", "--index.fit_steps", "5", "--index.prototypes", "32")
    kind = ("--index.space", "hidden", "--index.hidden_rank", "4", "--index.precision", "fp32", *quick)
    answers = []
    for name in ("cpu", "cuda"):
        where = ("--index.dir", runs[name] / "hidden", "--ckpt_path", run)
        ask = ("--index", runs[name] / "hidden", "--text", "import os", "--rerank", "--json")
        with pretended_cuda():
            cli("index", *arguments, *where, *kind, "--device", name, check=0)
            answers.append(json.loads(cli("attribute", "--ckpt_path", run, *ask, "--device", name, check=0).stdout))
    assert differences(*answers, 1e-4) == []


def test_a_bridge_computes_where_its_model_is(trained):
    from prism_lightning.evaluation.harness import PrismHarnessModel

    with pretended_cuda() as device:
        model, tokenizer = load_exported(trained[0])
        assert PrismHarnessModel(model=model, tokenizer=tokenizer).device == torch.device("cpu")
        assert PrismHarnessModel(checkpoint=trained[0]).device == device
        assert PrismHarnessModel(checkpoint=trained[0], device="cpu").device == torch.device("cpu")


# Another type


@pytest.mark.parametrize("kind", [{}, {"num_prototypes": 16}])
def test_the_decoder_alone_is_rounded(make_model, backbone, kind):
    model = make_model(backbone, **kind).eval()
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    head, logits = model.lm_head.weight.clone(), model(ids).logits
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.narrow_decoder(torch.bfloat16, "known")
    model.tie_weights()  # as the harness does
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.equal(head)
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())  # rotary frequencies
    rounded = model(ids).logits
    assert rounded.dtype == model.hidden_states(ids).dtype == torch.float32
    assert 0 < (rounded - logits).abs().max() < 0.05 * logits.std()
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape == (2, 12)


def test_a_rounded_model_is_still_the_one_that_was_stored(trained):
    model, tokenizer = load_exported(trained[0], dtype="bf16")
    whole, _ = load_exported(trained[0])
    assert model.dtype == torch.bfloat16 and model_fingerprint(model) == model_fingerprint(whole)
    ids = tokenizer("import os\nfrom x import y", return_tensors="pt")["input_ids"]
    split, exact = decompose(model, ids[:, :-1], ids[:, 1:]), decompose(whole, ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(split.total_BT, split.logit_BT, atol=1e-4, rtol=0)  # exact, whatever z is
    assert 0 < (split.log_probability_BT - exact.log_probability_BT).abs().max() < 0.1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_rounded_decoder(trained, runs, plain, cli, verb):
    """The rounded model uses the index and the intervention that were made with the exact model."""
    if not (runs["bf16"] / "index").is_dir():
        answer(cli, runs["bf16"], trained[1], "index", "--device", "cpu")
    rounded = answer(cli, runs["bf16"], trained[1], verb, "--device", "cpu", "--dtype", "bf16")
    whole = plain.get(verb) or answer(cli, runs["cpu"], trained[1], verb, "--device", "cpu")
    assert headline(verb, rounded) == pytest.approx(headline(verb, whole), abs=ROUNDED[verb])
    if verb == "suppress":
        steered = ("--intervention", "suppress")
        cli("generate", "--ckpt_path", runs["bf16"], "--prompt", "x", "--max_new_tokens", 4, *steered, check=0)
    if verb in ("explain", "attribute"):
        assert headline(verb, rounded) != headline(verb, whole)  # or nothing was rounded


def test_evaluations_of_either_type_are_kept_apart(trained, runs, cli):
    rounded, exact = (
        answer(cli, runs["bf16"], trained[1], "evaluate", "--device", "cpu", "--dtype", dtype)
        for dtype in ("bf16", "fp32")
    )
    assert rounded["results"][0][0]["identity"].pop("dtype") == "bf16"
    assert rounded["results"][0][0]["identity"] == exact["results"][0][0]["identity"]


def test_an_index_is_finished_in_the_type_it_was_begun_in(trained, runs, cli, tmp_path):
    run, arguments = trained
    line = ("index", *arguments, "--ckpt_path", run, "--index.dir", tmp_path / "index", "--index.fit_tokens", "4096")
    cli(*line, "--index.fit_steps", "2", "--dtype", "bf16", check=0)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16" and manifest["model"] == model_fingerprint(load_exported(run)[0])
    refused = cli(*line, "--index.fit_steps", "2")
    assert refused.returncode == 2 and "an index with another dtype" in refused.stderr
    result = cli("attribute", "--ckpt_path", run, "--index", tmp_path / "index", "--text", "import os", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)[0]["tokens"]


def test_export_writes_rounded_weights_when_asked(trained, cli, tmp_path):
    run, _ = trained
    types = {}
    for dtype in ("fp32", "bf16"):
        cli("export", "--ckpt_path", run, "--out", tmp_path / dtype, "--dtype", dtype, check=0)
        with safe_open(tmp_path / dtype / "model.safetensors", "pt") as file:
            types[dtype] = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert types == {"fp32": {"F32"}, "bf16": {"BF16"}}
    stored, whole = (load_exported(tmp_path / dtype)[0] for dtype in ("bf16", "fp32"))
    assert model_fingerprint(whole) == model_fingerprint(load_exported(run)[0]) != model_fingerprint(stored)
    for rounded, exact in zip(stored.parameters(), whole.parameters(), strict=True):
        assert rounded.equal(exact.bfloat16().float())


# Memory


@pytest.fixture
def memory_files(monkeypatch, tmp_path):
    """Pretend the content of the kernel's files; None stands for a file that is missing."""
    from prism_lightning.common import devices

    def pretend(available, limit=None, used=None):
        contents = {
            "/proc/meminfo": None if available is None else f"MemTotal: 999 kB\nMemAvailable:   {available} kB\n",
            "/sys/fs/cgroup/memory.max": limit,
            "/sys/fs/cgroup/memory.current": used,
        }

        class Pretended(type(tmp_path)):
            def read_text(self, *_, **__):
                if contents[str(self)] is None:
                    raise FileNotFoundError(str(self))
                return contents[str(self)]

        monkeypatch.setattr(devices, "Path", Pretended)

    return pretend


def test_available_memory_is_what_the_kernel_and_the_container_leave(memory_files):
    from prism_lightning.common.devices import available_memory

    memory_files(1000)
    assert available_memory() == 1000 * 1024
    memory_files(1000, limit="500000\n", used="100000\n")
    assert available_memory() == 400000
    memory_files(10, limit="500000\n", used="100000\n")
    assert available_memory() == 10 * 1024
    memory_files(1000, limit="max\n", used="100000\n")
    assert available_memory() == 1000 * 1024
    memory_files(None)
    assert available_memory() is None


def test_available_memory_of_this_machine_is_some_of_its_memory():
    import psutil

    from prism_lightning.common.devices import available_memory

    assert 0 < available_memory() <= psutil.virtual_memory().total
