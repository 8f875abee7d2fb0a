"""Imports of the fork server, whose children then start with them. Importing starts no thread and computes nothing.

`prism_lightning.cli.settings_page` comes first: `Union[int, float]` prints as whichever order of the two was imported
first, and a test compares settings.txt with what `python -m prism_lightning.cli.settings_page` writes.
"""

import gc
import os

from prism_lightning.cli.main import QUIET_LIBRARIES

# MLflow reads these when it is imported, which `fit` does after it has set them; DeepSpeed looks for CUDA otherwise.
for _name, _value in (QUIET_LIBRARIES | {"MLFLOW_LOGGING_LEVEL": "CRITICAL", "DS_ACCELERATOR": "cpu"}).items():
    os.environ.setdefault(_name, _value)

import prism_lightning.cli.settings_page  # noqa: E402, I001

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 - and all of torch.compile, three seconds
import mlflow.store.tracking.sqlalchemy_store  # noqa: E402, F401
import sklearn.cluster  # noqa: E402, F401
import transformers.models.gpt2.modeling_gpt2  # noqa: E402, F401

import prism_lightning.cli.attribution  # noqa: E402
import prism_lightning.cli.index  # noqa: E402
import prism_lightning.cli.models  # noqa: E402
import prism_lightning.training.trainer  # noqa: E402, F401

# What is imported stays: the children's collections (DeepSpeed's, Lightning's) need not walk it, 0.4 s each time.
gc.collect()
gc.freeze()
