"""Old names of public modules, which still import for one release, with a `DeprecationWarning`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    # The entry point of an installation in place that was not installed again.
    "student_trainer.cli": "student_trainer.commands.main",
    "student_trainer.cached_teacher": "student_trainer.teacher.cache",
    "student_trainer.commands.registry": "student_trainer.config.commands",
    "student_trainer.nonfinite": "student_trainer.training.nonfinite",
    "student_trainer.teacher.sparse": "student_trainer.teacher.sparse_gkd",
    "student_trainer.trainer": "student_trainer.training.trainer",
    "student_trainer.vllm_teacher": "student_trainer.teacher.vllm",
}


class _OldName(Loader):
    """A loader that fills a module with the public names of another one."""

    def exec_module(self, module: ModuleType) -> None:
        new = import_module(MOVED[module.__name__])
        public = {name: value for name, value in vars(new).items() if not name.startswith("_")}
        vars(module).update(public)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        warnings.warn(f"{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, _OldName())


def install() -> None:
    """Let the old names be imported."""
    sys.meta_path.append(_Finder())
