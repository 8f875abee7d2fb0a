"""The model's own modules as files for a model folder, which `trust_remote_code=True` loads without this package.

transformers finds the files through `auto_map` in config.json, copies them next to each other, and follows the relative
imports between them. The files are the sources of this package with rewritten imports, so there is one model to test.
"""

from __future__ import annotations

import re
from importlib import resources

from prism_lightning import __version__

PACKAGE = "prism_lightning"
MODEL_MODULE = f"{PACKAGE}.models.language_model"
CONFIGURATION_MODULE = f"{PACKAGE}.models.configuration"
OWN_IMPORT = re.compile(rf"^(\s*)from ({PACKAGE}(?:\.\w+)+) import ", re.MULTILINE)


def auto_map() -> dict[str, str]:
    """Return the entry of config.json that names the classes in the files of `portable_files`."""
    return {
        "AutoConfig": f"{_flat_name(CONFIGURATION_MODULE)}.PrismConfig",
        "AutoModelForCausalLM": f"{_flat_name(MODEL_MODULE)}.PrismForCausalLM",
    }


def portable_files() -> dict[str, str]:
    """Return name and content of every file: the modules of model and configuration, and all that they import."""
    files: dict[str, str] = {}
    modules = [MODEL_MODULE, CONFIGURATION_MODULE]
    while modules:
        module = modules.pop()
        name = f"{_flat_name(module)}.py"
        if name not in files:
            source = _source(module)
            modules += [imported for _, imported in OWN_IMPORT.findall(source)]
            header = f"# From {PACKAGE} {__version__}, module {module}. MIT License, the {PACKAGE} authors.\n"
            files[name] = header + OWN_IMPORT.sub(_relative_import, source)
    return dict(sorted(files.items()))


def _relative_import(statement: re.Match[str]) -> str:
    return f"{statement[1]}from .{_flat_name(statement[2])} import "


def _flat_name(module: str) -> str:
    """Return the name of a module's file without suffix: transformers copies no folders."""
    return "prism_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _source(module: str) -> str:
    package, name = module.rsplit(".", 1)
    return resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")
