"""push and pull against a fake hub: what is sent, what is refused, and that nothing is sent without a word."""

import io
import json
import signal
import socket
import subprocess
import time

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save
from support.fake_hub import TOKEN, FakeHub
from support.processes import child_environment, command
from support.refusals import refused
from support.runs import ROOT

from prism_lightning.common.files import CHECKSUMS, folder_integrity_error
from prism_lightning.models.steering import Scaling
from prism_lightning.run import hub as hub_module
from prism_lightning.run.model_folder import load_exported, save_exported

REPO = "alice/small_prism"


def point_to(url, setting=setattr):
    """Set what huggingface_hub read from the environment when it was imported."""
    setting(huggingface_hub.constants, "ENDPOINT", url)
    setting(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    setting(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the fake speaks LFS


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake hub to which this process and its children talk, with a token, an empty home and no terminal."""
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch.setattr)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr("sys.stdin", io.StringIO())
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


@pytest.fixture
def run(make_model, byte_tokenizer, tmp_path):
    """A run directory with a PRISM model that has prototypes scaled."""
    model = make_model(num_prototypes=8)
    model.intervene(Scaling({2: 0.0}), Scaling({1: 3.0}, (5, 6)))
    save_exported(model, byte_tokenizer, tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture
def pushed(hub, run, cli):
    """The hub once the run was sent to it."""
    cli("push", "--ckpt_path", run, "--repo", REPO, "--yes", check=0)
    return hub


def logits_of(path):
    model, _ = load_exported(path)
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_push_then_pull_gives_equal_logits(run, tmp_path):
    """By processes as a user starts them, told about the hub by the environment alone."""
    with FakeHub() as fake:
        settings = {"HF_ENDPOINT": fake.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment = child_environment(HF_HOME=str(tmp_path / "home"), **settings)
        environment["PYTHONPATH"] = str(ROOT)

        def shell(*arguments):
            process = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, cwd=tmp_path)
            assert process.returncode == 0, process.stderr
            return process

        sent = shell("push", "--ckpt_path", run, "--repo", REPO, "--private", "--yes")
        assert fake.repositories[REPO].private
        files = fake.repositories[REPO].files("main")
        fetched = shell("pull", REPO, "--out", "runs/pulled")
    assert TOKEN not in sent.stdout + sent.stderr + fetched.stdout + fetched.stderr
    pulled = tmp_path / "runs" / "pulled"
    assert sorted(path.name for path in pulled.iterdir()) == ["model"]
    taken = {path.name for path in (pulled / "model").iterdir()}
    assert taken == {name for name in files if not name.endswith((".py", ".gitattributes"))}
    assert {"README.md", "model.safetensors"} < taken and any(name.endswith(".py") for name in files)
    assert folder_integrity_error(pulled / "model") is None
    assert torch.equal(logits_of(pulled), logits_of(run))


def test_what_is_printed_is_what_arrives(hub, run, cli):
    shown = cli("push", "--ckpt_path", run, "--repo", REPO, "--yes", check=0).stdout
    files = hub.repositories[REPO].files("main")
    listed = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in shown.splitlines()
        if "bytes" in line and line.startswith("  ")
    }
    assert listed == {name: len(content) for name, content in files.items() if name != ".gitattributes"}
    assert f"to: {REPO} on the Hugging Face hub, public" in shown and f"sent: {hub.url}/{REPO}" in shown
    assert not hub.repositories[REPO].private
    card = files["README.md"].decode()
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card and f"prism pull {REPO}" in card


def test_nothing_is_sent_without_a_word(hub, run, cli):
    result = cli("push", "--ckpt_path", run, "--repo", REPO)
    refused(result, "run the same command with --yes")
    assert "model.safetensors" in result.stdout and hub.requests == []


@pytest.mark.parametrize(("answer", "sent"), [("y\n", True), ("no\n", False), ("\n", False), ("", False)])
def test_a_terminal_is_asked(hub, run, cli, monkeypatch, answer, sent):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    shown = cli("push", "--ckpt_path", run, "--repo", REPO, check=0).stdout
    assert (REPO in hub.repositories) == sent == bool(hub.requests)
    assert ("nothing was sent" in shown) != sent


def test_a_public_repository_is_no_place_for_a_private_model(hub, run, cli):
    hub.add(REPO, {"README.md": b"mine"})
    refused(cli("push", "--ckpt_path", run, "--repo", REPO, "--private", "--yes"), "exists and is public")
    assert hub.repositories[REPO].files("main") == {"README.md": b"mine"}
    assert [path for _, path in hub.changes] == ["/api/repos/create"]  # which the hub declined


@pytest.mark.parametrize("name", ["small_prism", "a/b/c", "../x/y", "alice/", "alice/x y", "https://hf.co/alice/x"])
def test_a_name_that_is_no_repository(hub, run, cli, tmp_path, name):
    refused(cli("push", "--ckpt_path", run, "--repo", name, "--yes"), "give USER/NAME")
    refused(cli("pull", name, "--out", tmp_path / "out"), "give USER/NAME")
    assert hub.requests == []


def test_push_without_a_token_or_with_a_wrong_one(hub, run, cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    result = cli("push", "--ckpt_path", run, "--repo", REPO, "--yes")
    refused(result, "the hub answers 401", "hf auth login")
    assert "wrongwrong" not in result.stdout + result.stderr
    monkeypatch.delenv("HF_TOKEN")
    requests = len(hub.requests)
    refused(cli("push", "--ckpt_path", run, "--repo", REPO, "--yes"), "no Hugging Face token", "hf auth login")
    assert len(hub.requests) == requests and hub.repositories == {}


def test_a_second_push_replaces_the_files(pushed, run, cli, make_model, byte_tokenizer, tmp_path):
    save_exported(make_model(num_prototypes=8, seed=1), byte_tokenizer, run / "model")
    cli("push", "--ckpt_path", run, "--repo", REPO, "--yes", check=0)
    cli("pull", REPO, "--out", tmp_path / "new", check=0)
    assert torch.equal(logits_of(tmp_path / "new"), logits_of(run))


def test_pull_of_a_revision_and_of_an_edited_card(pushed, cli, tmp_path, run):
    first = pushed.repositories[REPO].main
    files = pushed.repositories[REPO].files("main")
    pushed.add(REPO, files | {"README.md": b"---\n{}\n---\nedited on the hub\n", "config.json": b"{}"})
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "holds no model (no config.json")
    pushed.add(REPO, files | {"README.md": b"---\n{}\n---\nedited on the hub\n"})
    cli("pull", REPO, "--out", tmp_path / "new", check=0)
    assert "edited on the hub" in (tmp_path / "new" / "model" / "README.md").read_text()
    cli("explain", "--ckpt_path", tmp_path / "new", "--text", "import", check=0)
    cli("generate", "--ckpt_path", tmp_path / "new", "--prompt", "import", "--max_new_tokens", "4", check=0)
    cli("export", "--ckpt_path", tmp_path / "new", "--out", tmp_path / "exported", check=0)
    assert torch.equal(logits_of(tmp_path / "exported"), logits_of(run))
    refused(cli("prototypes", "--ckpt_path", tmp_path / "new"), "has no recipe.yaml")
    cli("pull", REPO, "--revision", first, "--out", tmp_path / "old", check=0)
    assert (tmp_path / "old" / "model" / "README.md").read_bytes() == files["README.md"]
    assert torch.equal(logits_of(tmp_path / "old"), logits_of(run))
    refused(cli("pull", REPO, "--revision", "gone", "--out", tmp_path / "gone"), "no such revision")
    assert not (tmp_path / "gone").exists()


def test_a_pulled_model_keeps_its_card_when_it_is_shared_again(pushed, cli, tmp_path):
    cli("pull", REPO, "--out", tmp_path / "new", check=0)
    shown = cli("push", "--ckpt_path", tmp_path / "new", "--repo", "bob/copy", "--yes", check=0).stdout
    assert "The card is kept from" in shown
    copy = pushed.repositories["bob/copy"].files("main")
    assert copy["README.md"] == pushed.repositories[REPO].files("main")["README.md"]
    assert {name for name in copy if name.endswith(".py")}


def test_an_existing_folder_is_kept(pushed, cli, tmp_path):
    (tmp_path / "mine").mkdir()
    requests = len(pushed.requests)
    refused(cli("pull", REPO, "--out", tmp_path / "mine"), "exists: give a folder that does not exist, or remove it")
    assert len(pushed.requests) == requests and list((tmp_path / "mine").iterdir()) == []


def test_code_and_pickles_are_not_taken(pushed, cli, tmp_path):
    files = pushed.repositories[REPO].files("main")
    more = {
        "evil.py": b"1/0",
        "pytorch_model.bin": b"\x80",
        "sub/config.json": b"{}",
        "custom_generate/generate.py": b"1/0",
    }
    pushed.add(REPO, files | more)
    cli("pull", REPO, "--out", tmp_path / "new", check=0)
    names = {str(path.relative_to(tmp_path / "new" / "model")) for path in (tmp_path / "new" / "model").rglob("*")}
    assert names == {name for name in files if not name.endswith((".py", ".gitattributes"))}


@pytest.mark.parametrize("damage", ["a bit of the weights", "a bit of the tokenizer", "no tokenizer"])
def test_damaged_files_are_refused_by_name(pushed, cli, tmp_path, damage):
    """On the hub itself: the checksums of the exporting program tell."""
    files = dict(pushed.repositories[REPO].files("main"))
    name = "model.safetensors" if "weights" in damage else "tokenizer.json"
    content = bytearray(files.pop(name))
    content[len(content) // 2] ^= 1
    pushed.add(REPO, files if "no " in damage else files | {name: bytes(content)})
    refused(cli("pull", REPO, "--out", tmp_path / "deep" / "new"), name, "pull again")
    assert list((tmp_path / "deep").iterdir()) == []


def test_weights_that_change_on_the_way_are_refused(pushed, cli, tmp_path):
    """Without checksums of ours the hub's own tell."""
    files = dict(pushed.repositories[REPO].files("main"))
    del files[CHECKSUMS]
    pushed.add(REPO, files)
    for oid, content in pushed.lfs.items():
        if content == files["model.safetensors"]:
            pushed.lfs[oid] = content[:-1] + bytes([content[-1] ^ 1])
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "model.safetensors does not match its SHA-256")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


PRISM = b'{"model_type": "prism"}'
PLAIN = {"config.json": json.dumps({"model_type": "gpt2"}).encode(), "model.safetensors": save({"a": torch.ones(2)})}
REFUSED = {
    "plain": (PLAIN, ["gpt2 model without prototypes", "retrofit --model alice/other"]),
    "no model": ({"README.md": b"text"}, ["holds no model"]),
    "damaged settings": ({"config.json": b"{"}, ["holds no model"]),
    "pickled": (
        {"config.json": b'{"model_type": "prism"}', "pytorch_model.bin": b"\x80"},
        ["no weights in safetensors"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_prism_model_is_refused_before_weights_are_fetched(hub, cli, tmp_path, case):
    files, words = REFUSED[case]
    hub.add("alice/other", files)
    refused(cli("pull", "alice/other", "--out", tmp_path / "runs" / "new"), *words)
    assert not (tmp_path / "runs").exists()
    assert not any("safetensors" in path for _, path, _ in hub.requests)


def test_unknown_and_closed_repositories(hub, cli, tmp_path, monkeypatch):
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "not on the hub, or is not open to you")
    hub.refuse["GET", "/api/models"] = 403
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "the hub answers 403")
    assert list(tmp_path.glob("new*")) == []


def test_without_a_network_one_line_at_once(hub, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "HF_HUB_OFFLINE: unset it")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch.setattr)  # refuses connections
    started = time.monotonic()
    refused(
        cli("pull", REPO, "--out", tmp_path / "new"), "no usable answer from the Hugging Face hub", "check the network"
    )
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch.setattr)  # never answers
        refused(
            cli("pull", REPO, "--out", tmp_path / "new"),
            "no usable answer from the Hugging Face hub",
            "check the network",
        )
    assert time.monotonic() - started < 5
    assert list(tmp_path.glob("new*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_pull_leaves_nothing_incomplete(pushed, cli, run, tmp_path, number):
    pushed.stall_after = 8192
    out = tmp_path / "runs" / "new"
    environment = child_environment(HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=pushed.url, HF_HUB_DISABLE_XET="1")
    child = subprocess.Popen(command("pull", REPO, "--out", out), env=environment, cwd=ROOT, stderr=subprocess.PIPE)
    assert pushed.stalled.wait(30)
    assert not out.exists()
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number), errors
    assert not out.exists()
    pushed.stall_after = None
    pushed.release.set()
    assert number == signal.SIGKILL or list(out.parent.iterdir()) == []
    cli("pull", REPO, "--out", out, check=0)  # removes what a kill left
    assert list(out.parent.iterdir()) == [out]
    assert torch.equal(logits_of(out), logits_of(run))


def test_a_full_disk_leaves_nothing(pushed, cli, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "write_checksums", full)
    refused(cli("pull", REPO, "--out", tmp_path / "new"), "the disk is full")
    assert list(tmp_path.glob("new*")) == []
