"""MLflow's tables, migrated once per machine and session: a fit's fifty migrations are 1,700 writes to the disk."""

import os
import shutil
from pathlib import Path

import filelock

VARIABLE = "PRISM_TEST_MLFLOW_TEMPLATE"


def use_template():
    """Copy the template wherever MLflow would migrate an empty SQLite file; the first caller makes the template.

    Only MLflow's own function is replaced, and only where the environment names the template. What prism_lightning
    does around it runs as it is.
    """
    import mlflow.store.db.utils as database

    template = os.environ.get(VARIABLE)
    migrate = database._initialize_tables
    if not template or hasattr(migrate, "template"):
        return

    def copied(engine):
        path = engine.url.database
        if engine.dialect.name != "sqlite" or not path or (Path(path).exists() and Path(path).stat().st_size):
            return migrate(engine)
        with filelock.FileLock(template + ".lock"):
            if Path(template).is_file():
                shutil.copyfile(template, path)
            else:
                migrate(engine)
                engine.dispose()
                shutil.copyfile(path, template + ".partial")
                os.replace(template + ".partial", template)

    copied.template = template
    database._initialize_tables = copied
