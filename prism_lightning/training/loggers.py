"""The loggers of a run: CSV files and MLflow."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import write_whole
from prism_lightning.run.directory import RunDirectory
from prism_lightning.run.mlflow_store import SQLITE, check_uri, database_path, make_database, why_unusable
from prism_lightning.training.ranks import first_process


def run_loggers(run: RunDirectory) -> tuple[CSVLogger, MLFlowLogger | DummyLogger]:
    """Return the CSV logger and the MLflow logger of a run; a resumed run logs to the same MLflow run.

    The CSV logger comes first, because Lightning takes the first logger's address for a folder.

    Raises:
        UserError: as `open_logger`.
    """
    own = run.settings.tracking_uri is None
    run_id = run.paths.mlflow_run_id
    uri = run.settings.tracking_uri or f"{SQLITE}{run.paths.mlflow_database.absolute()}"
    mlflow_logger = open_logger(
        uri,
        used_before=not own or run_id.is_file(),
        experiment_name=run.settings.experiment,
        run_name=run.paths.root.name,
        run_id=run_id.read_text() if run_id.is_file() else None,
        artifact_location=str(run.paths.mlflow_artifacts.absolute()) if uri.startswith("sqlite") else None,
    )
    return CSVLogger(run.paths.root, name=run.paths.csv.name), mlflow_logger


def log_settings(run: RunDirectory, config: dict[str, Any], mlflow_logger: MLFlowLogger | DummyLogger) -> None:
    """Log the settings of a new MLflow run, and record the MLflow run in the run directory for resuming."""
    if isinstance(mlflow_logger, DummyLogger):
        return
    run_id = str(mlflow_logger.run_id)
    recorded = run.paths.mlflow_run_id
    if not (recorded.is_file() and recorded.read_text() == run_id):
        mlflow_logger.log_hyperparams(config)
        write_whole(recorded, run_id.encode())


def open_logger(uri: str, used_before: bool, **settings: Any) -> MLFlowLogger | DummyLogger:
    """Return an MLflow logger whose MLflow run exists; in the further ranks of a run, one that logs nothing.

    `MLFlowLogger` connects to its store in every rank, though only the first one logs. A connection to a SQLite file
    creates missing tables, in a file that the first rank then replaces.

    Args:
        uri: address of the store: sqlite:///FILE, a database or a server.
        used_before: whether the store may hold runs; otherwise a damaged SQLite file is replaced.
        settings: of `MLFlowLogger`; a `run_id` that the store does not have is replaced by a new run.

    Raises:
        UserError: an address that MLflow refuses, a damaged database, or a server that does not answer.
    """
    check_uri(uri)
    if not first_process():
        return DummyLogger()
    try:
        if uri.startswith(SQLITE):
            make_database(database_path(uri), used_before)
        return _opened(uri, settings)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy's, MLflow's and the network's errors share no base class
        raise UserError(why_unusable(uri, error)) from error


def _opened(uri: str, settings: dict[str, Any]) -> MLFlowLogger:
    from mlflow.exceptions import MlflowException

    logger = MLFlowLogger(tracking_uri=uri, **settings)
    try:
        _ = logger.run_id
    except MlflowException as error:
        if settings.get("run_id") is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger = MLFlowLogger(tracking_uri=uri, **settings | {"run_id": None})
        _ = logger.run_id
    return logger
