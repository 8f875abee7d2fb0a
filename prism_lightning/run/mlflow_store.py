"""The MLflow store of a run: made aside where it is a SQLite file, and told in one line where it cannot be used."""

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
    """Raises UserError where MLflow would not take an address."""
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
    """The file of a SQLite address."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def make_database(path: Path, used_before: bool) -> None:
    """Make a SQLite database with MLflow's tables, where there is none: aside, then renamed.

    MLflow itself migrates fifty versions of an empty file in place; killed in between, it refuses that file for ever.
    A lock lets trials of a sweep that share the file wait for each other.

    Raises:
        UserError: the folder cannot be written.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.tracking_uri: {path.parent} cannot be made ({error.strerror}): choose another") from error
    with filelock.FileLock(path.with_name(path.name + ".lock")):
        if path.is_file() and (used_before or _has_tables(path)):
            return
        if path.is_file():
            os.replace(path, path.with_name(path.name + ".damaged"))
        with partial_file(path) as partial:
            SqlAlchemyStore(f"{SQLITE}{partial}", "./mlruns")._dispose_engine()


def _has_tables(path: Path) -> bool:
    """Whether MLflow's newest tables are there: a file that a killed process left behind has only some of them.

    Raises:
        sqlite3.OperationalError: the file cannot be read now: it is locked, say.
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


# What a database says, and what helps: the first that fits.
REMEDIES = {
    "locked": "another process uses it: run the same command again when that is done",
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
    """What a store that does not work says, and what helps, in one line."""
    if disk_is_full(error):
        return "the disk is full: free space and run the same command; earlier checkpoints are whole"
    cause = " ".join(visible(str(error)).split())
    remedy = next((text for sign, text in REMEDIES.items() if sign in cause.lower()), None)
    if uri.startswith(SQLITE) and remedy == "it is damaged":
        path = database_path(uri)
        return (
            f"the MLflow database {path} is damaged ({cause[:160]}): rename it and run the same command, which makes a"
            " new one; weights and csv metrics are not in it"
        )
    remedy = remedy or "start the server, give another address, or leave the setting out"
    return f"run.tracking_uri {uri} does not work ({cause[:160]}): {remedy}"
