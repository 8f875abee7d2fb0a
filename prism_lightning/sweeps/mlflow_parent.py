"""Group the MLflow runs of a sweep under one parent run."""

from __future__ import annotations

import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from prism_lightning.common.files import write_whole
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.mlflow_store import SQLITE, check_uri, database_path, make_database


def parent_run(folder: Path, uri: str) -> str:
    """Return the id of the sweep's parent run; create the run if it does not exist.

    Raises:
        UserError: MLflow does not accept the address.
    """
    check_uri(uri)
    if uri.startswith(SQLITE):
        make_database(database_path(uri), used_before=True)
    id_file = folder / "mlflow_parent_id"
    if id_file.is_file():
        return id_file.read_text()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(folder.name)
    if experiment is None:
        artifacts = (folder / "mlflow_artifacts").absolute()
        experiment_id = client.create_experiment(folder.name, str(artifacts) if uri.startswith("sqlite") else None)
    else:
        experiment_id = experiment.experiment_id
    run = client.create_run(experiment_id, tags={MLFLOW_RUN_NAME: f"sweep {folder.name}"})
    write_whole(id_file, run.info.run_id.encode())
    return run.info.run_id


def attach_to_parent(folder: Path, uri: str, run: Path) -> None:
    """Make a run's MLflow run a child of the sweep's parent run, if the run has an MLflow run yet.

    A store that does not answer must not end a trial, so such an error is printed to stderr only.
    """
    id_file = RunPaths(run).mlflow_run_id
    if not id_file.is_file():
        return
    try:
        MlflowClient(tracking_uri=uri).set_tag(id_file.read_text(), MLFLOW_PARENT_RUN_ID, parent_run(folder, uri))
    except MlflowException as error:
        print(f"{run.name}: its MLflow run could not be attached to the sweep's parent run: {error}", file=sys.stderr)
