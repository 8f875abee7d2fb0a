"""A random sample of a prepared training split, as a prepared folder of its own."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import closing
from pathlib import Path

import filelock

from prism_lightning.common.files import partial_folder
from prism_lightning.data.integrity import SPLITS, DamagedDataError, read_prepared, write_manifest
from prism_lightning.data.store import StoreWriter, TokenStore

WHOLE_FACTOR = 1.25  # A corpus of at most this many times the sample is used whole.


def sampled_store(store: TokenStore, tokens: int, folder: Path) -> TokenStore:
    """Return a store of random whole documents with about so many tokens together; a small corpus itself.

    Args:
        store: the training split.
        tokens: number of tokens of the sample.
        folder: of the sample; an undamaged sample in it is used again. A new one is written aside, then renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    if store.counts["tokens"] <= WHOLE_FACTOR * tokens:
        return store
    identity = f"{store.manifest['fingerprint']} {tokens}"
    fingerprint = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(folder.name + ".lock")):
        if not _is_sample(folder, fingerprint):
            with partial_folder(folder) as partial:
                _write(store, store.sample(tokens), partial, fingerprint)
    return TokenStore(folder, "train", store.block_size, store.isolated)


def _is_sample(folder: Path, fingerprint: str) -> bool:
    try:
        return read_prepared(folder, checksums=True)["fingerprint"] == fingerprint
    except DamagedDataError:
        return False


def _write(store: TokenStore, documents: list[int], folder: Path, fingerprint: str) -> None:
    dtype = store.manifest["dtype"]
    table = store.documents.take(documents)
    flags = store.target_flags
    masked = flags is not None
    writers = [StoreWriter(folder / split, dtype, masked) for split in SPLITS]
    with closing(writers[0]) as train, closing(writers[1]) as validation:
        ids = [store.document_tokens(number) for number in documents]
        names, rows, sizes = (table[column].to_pylist() for column in ("name", "row", "bytes"))
        train.append(names, rows, sizes, ids, None if flags is None else [flags[store.span(n)] for n in documents])
    shutil.copytree(store.folder / "tokenizer", folder / "tokenizer")
    empty_counts = validation.counts | {"max_id": 0}
    inherited = {name: store.manifest[name] for name in ("dtype", "tokenizer_size", "inputs")}
    write_manifest(folder, inherited | {"fingerprint": fingerprint, "train": train.counts, "validation": empty_counts})
