"""Building: shards, ranks and interruptions change nothing; damage is named and mended alone."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from support.corpus_model import BACKBONE, FirstBlocks
from support.curvature import dictionary_of, question, statistics

from prism_lightning.attribution.index.opening import open_index
from prism_lightning.attribution.settings import IndexSettings
from prism_lightning.common import files
from prism_lightning.common.errors import UserError


def contents(index):
    """Every file of an index but its lock, byte for byte."""
    return {p.relative_to(index.folder): p.read_bytes() for p in index.folder.rglob("*.*") if p.is_file()}


def scores(index, model, store):
    records, _ = statistics(model.float(), store, dictionary_of(index))
    model.float()
    hits = index.score(question(index, records, slice(100, 110)))
    return hits.tokens, hits.influence


FITTED = {"dictionary": "fitted", "prototypes": 40, "active": 2, "fit_steps": 10}
in_both_spaces = pytest.mark.parametrize("space", ["logits", "hidden"])


@in_both_spaces
def test_two_ranks_and_one_build_the_same_bytes(built, space):
    fitted = FITTED | {"space": space}
    one = built("one", **fitted)
    assert one.num_shards == 3
    assert built("two", rank=1, world_size=2, **fitted) is None
    two = built("two", rank=0, world_size=2, **fitted)
    assert contents(one) == contents(two)


@in_both_spaces
def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(built, monkeypatch, space):
    fitted = FITTED | {"space": space}
    whole = built("whole", **fitted)
    write, written = files.write_whole, []

    def interrupted(path, content, before=None):
        if path.suffix == ".safetensors":
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path)
        write(path, content, before)

    monkeypatch.setattr(files, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built("index", **fitted)
    assert [path.stem for path in written] == ["dictionary", "00000"]
    before = written[1].stat().st_mtime_ns
    monkeypatch.setattr(files, "write_whole", write)
    resumed = built("index", **fitted)
    assert written[1].stat().st_mtime_ns == before
    assert contents(resumed) == contents(whole)


def test_shard_and_batch_sizes_change_no_score(built, model, store):
    expected_tokens, expected = scores(built("a"), model, store)
    for name, settings in {
        "b": {"shard_tokens": 100_000},
        "c": {"shard_tokens": 64},
        "d": {"batch_tokens": 32},
    }.items():
        tokens, influence = scores(built(name, **settings), model, store)
        assert np.array_equal(tokens, expected_tokens)
        assert np.abs(influence - expected).max() < 1e-4 * np.abs(expected).max()


@in_both_spaces
@pytest.mark.parametrize("harm", ["bit", "truncation", "removal"])
def test_a_damaged_shard_is_named_and_rebuilt_alone(built, harm, space):
    index = built(space=space)
    before = contents(index)
    path = index.shard_paths[1]
    content = bytearray(path.read_bytes())
    if harm == "bit":
        content[len(content) // 2] ^= 4
    path.write_bytes(content[:-5] if harm == "truncation" else content)
    if harm == "removal":
        path.unlink()
    with pytest.raises(UserError, match=r"shard .*00001.safetensors .* builds only what is damaged"):
        open_index(index.folder)
    others = [index.shard_paths[n].stat().st_mtime_ns for n in (0, 2)]
    assert contents(built(space=space)) == before
    assert [index.shard_paths[n].stat().st_mtime_ns for n in (0, 2)] == others


def test_no_rank_finishes_over_a_damaged_shard_of_another(built):
    whole = built("whole")
    before = contents(whole)
    whole.shard_paths[1].write_bytes(b"short")
    assert built("whole", rank=0, world_size=2) is None  # shard 1 belongs to rank 1
    assert contents(built("whole", rank=1, world_size=2)) == before


def test_shards_and_curvature_of_different_builds_are_no_index(built):
    index = built("one")
    facts = json.loads((index.folder / "curvature.json").read_text())
    facts["parts"][0] += 1  # as if the dictionary had been fitted again since
    (index.folder / "curvature.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="mixes files of different builds"):
        open_index(index.folder)
    assert built("one").tokens == 1920


def test_a_moved_corpus_is_found_again_by_the_same_command(built):
    index = built()
    manifest = json.loads((index.folder / "manifest.json").read_text())
    (index.folder / "manifest.json").write_text(json.dumps(manifest | {"store": "/nowhere"}))
    assert built().manifest == manifest


def test_a_folder_that_lost_its_settings_is_not_taken_for_another_model(built):
    index = built()
    (index.folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json is damaged"):
        built()


@pytest.mark.parametrize("name", ["dictionary", "curvature"])
def test_other_damaged_files_are_rebuilt_too(built, name):
    index = built(**FITTED)
    before = contents(index)
    (index.folder / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}.safetensors has 1 of"):
        open_index(index.folder)
    assert contents(built(**FITTED)) == before


def test_a_full_disk_names_the_file_and_keeps_what_is_finished(built, monkeypatch):
    opened, full = Path.open, [False]

    def failing(self, *arguments, **keywords):
        if full[0] and self.name.startswith("00001.safetensors.") and self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", failing)
    full[0] = True
    with pytest.raises(UserError, match=r"00001.safetensors could not be written \(the disk is full\)"):
        built()
    full[0] = False
    assert built().num_shards == 3


def test_an_index_of_something_else_is_not_overwritten(built, make_model, data, model):
    built()
    with pytest.raises(UserError, match="another index.precision, index.damping"):
        built(precision="fp16", damping=0.5)
    with pytest.raises(UserError, match="another model"):
        built(using=make_model(BACKBONE, seed=5, num_prototypes=24, active_prototypes=3).eval())
    with pytest.raises(UserError, match="another tokens"):
        built(over=FirstBlocks(data.train, 70))


def test_settings_are_checked_all_at_once():
    with pytest.raises(UserError) as caught:
        IndexSettings(space="hidden", active=0, damping=-1.0, rank=0, hidden_rank=-4)
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="index.precision is a setting of --index.space hidden"):
        IndexSettings(precision="fp16")


def test_a_dictionary_larger_than_its_sample_is_refused(built):
    with pytest.raises(UserError, match="cannot be fitted to 1024 hidden states"):
        built(dictionary="fitted", prototypes=5000)
    with pytest.raises(UserError, match="8 prototypes, 16 active, cannot be fitted"):
        built("other", space="logits", dictionary="fitted", prototypes=8)


def test_the_manifest_says_what_the_index_is_of(built, model):
    manifest = json.loads((built().folder / "manifest.json").read_text())
    assert manifest["tokens"] == 1920 and manifest["shards"] == 3 and manifest["prototypes"] == 24
