"""MLflow: the runs of a sweep as one parent's children."""

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
    """Id of the sweep's own run, made when it is not there yet.

    Raises:
        UserError: an address that MLflow does not take.
    """
    check_uri(uri)
    if uri.startswith(SQLITE):
        make_database(database_path(uri), used_before=True)
    remembered = folder / "mlflow_parent_id"
    if remembered.is_file():
        return remembered.read_text()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(folder.name)
    if experiment is None:
        artifacts = (folder / "mlflow_artifacts").absolute()
        number = client.create_experiment(folder.name, str(artifacts) if uri.startswith("sqlite") else None)
    else:
        number = experiment.experiment_id
    run = client.create_run(number, tags={MLFLOW_RUN_NAME: f"sweep {folder.name}"})
    write_whole(remembered, run.info.run_id.encode())
    return run.info.run_id


def adopt(folder: Path, uri: str, run: Path) -> None:
    """Make a run the sweep's child, if it has got as far as an MLflow run.

    A store that does not answer is no reason to end a trial: the warning goes to whoever runs the sweep.
    """
    child = RunPaths(run).mlflow_run_id
    if not child.is_file():
        return
    try:
        MlflowClient(tracking_uri=uri).set_tag(child.read_text(), MLFLOW_PARENT_RUN_ID, parent_run(folder, uri))
    except MlflowException as error:
        print(f"{run.name} could not be made a child of the sweep's MLflow run: {error}", file=sys.stderr)
