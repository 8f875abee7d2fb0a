"""The MLflow store of a run: creation of SQLite databases, and one-line error messages of stores that do not work."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import filelock

from prism_lightning.common.errors import UserError, disk_is_full, visible
from prism_lightning.common.files import partial_file

SQLITE = "sqlite:///"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")


def check_uri(uri: str) -> None:
    """Raise UserError if MLflow would refuse an address."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if ":" not in uri or scheme not in SCHEMES:
        raise UserError(
            f"run.tracking_uri {uri}: MLflow keeps runs in a database or on a server, not in a folder: give"
            " sqlite:///path/to/mlflow.db or http://SERVER:PORT"
        )
    if scheme == "sqlite" and not uri.startswith(SQLITE):
        raise UserError(f"run.tracking_uri {uri}: give sqlite:///path/to/mlflow.db, with three slashes")
    if scheme == "sqlite" and database_path(uri).is_dir():
        example = f"{SQLITE}{database_path(uri) / 'mlflow.db'}"
        raise UserError(f"run.tracking_uri {uri}: that is a folder: give a file in it, such as {example}")


def database_path(uri: str) -> Path:
    """Return the file of a SQLite address."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def make_database(path: Path, used_before: bool) -> None:
    """Create a SQLite database with MLflow's tables, unless it exists: under another name, then renamed.

    MLflow itself migrates an empty file in place through fifty versions. Killed in between, it refuses that file from
    then on. Trials of a sweep that share the file wait for each other's lock.

    Args:
        path: the database.
        used_before: whether an existing file may hold runs. It is then kept; otherwise a damaged one is renamed.

    Raises:
        UserError: the folder cannot be created.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.tracking_uri: {path.parent} cannot be created ({error.strerror}): choose another"
        ) from error
    with filelock.FileLock(path.with_name(path.name + ".lock")):
        if path.is_file() and (used_before or _has_tables(path)):
            return
        if path.is_file():
            os.replace(path, path.with_name(path.name + ".damaged"))
        with partial_file(path) as partial:
            SqlAlchemyStore(f"{SQLITE}{partial}", "./mlruns")._dispose_engine()


def _has_tables(path: Path) -> bool:
    """Return whether a database has MLflow's newest tables; one of a killed process has only some of them.

    Raises:
        sqlite3.OperationalError: the file cannot be read at present, for example because it is locked.
    """
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with closing(sqlite3.connect(path)) as connection:
            versions = connection.execute("select version_num from alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return False
    except sqlite3.DatabaseError:
        return False
    return versions == [(_get_latest_schema_revision(),)]


# A part of a database's error message, and the fix; the first match counts.
REMEDIES = {
    "locked": "another process uses it: run the same command again when that has ended",
    "readonly": "give yourself write access, or set another run.tracking_uri",
    "permission": "give yourself write access, or set another run.tracking_uri",
    "unable to open": "give yourself write access, or set another run.tracking_uri",
    "out-of-date": "it is of an older MLflow: back it up and run `mlflow db upgrade` with its address",
    "not a database": "it is damaged",
    "malformed": "it is damaged",
    "no such": "it is damaged",
    "already exists": "it is damaged",
}


def why_unusable(uri: str, error: Exception) -> str:
    """Return one line with the error of a store that does not work, and a fix."""
    if disk_is_full(error):
        return "the disk is full: free space and run the same command again; earlier checkpoints are complete"
    cause = " ".join(visible(str(error)).split())
    remedy = next((text for words, text in REMEDIES.items() if words in cause.lower()), None)
    if uri.startswith(SQLITE) and remedy == "it is damaged":
        path = database_path(uri)
        return (
            f"the MLflow database {path} is damaged ({cause[:160]}): rename it and run the same command again, which"
            " creates a new one; weights and csv metrics are not in it"
        )
    remedy = remedy or "start the server, give another address, or leave the setting out"
    return f"run.tracking_uri {uri} does not work ({cause[:160]}): {remedy}"
