"""Public modules that moved are found under their old names."""

from importlib import import_module

import pytest

from student_trainer.moved import MOVED


@pytest.mark.parametrize(("old", "new"), sorted(MOVED.items()))
def test_an_old_name_imports_the_same_classes_with_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(import_module("sys").modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        found = import_module(old)
    module = import_module(new)
    public = [name for name in vars(module) if not name.startswith("_")]
    assert len(public) > 3
    assert all(getattr(found, name) is getattr(module, name) for name in public)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        import_module("student_trainer.no_such_module")
