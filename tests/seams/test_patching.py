"""Patch and undo: before, during and after, and whatever others do meanwhile."""

import pytest

from dspy_mlflow_async.seams.patching import Patches, patch, together


class Owner:
    """Somebody whose attribute is patched."""

    def method(self):
        return "original"


def test_patch_and_undo():
    """The undo restores what was there."""
    undo = patch(Owner, method=lambda self: "patched")
    assert "patched" == Owner().method()
    undo()
    assert "original" == Owner().method()


def test_the_undo_leaves_a_later_patch_of_somebody_elses_alone():
    """Whoever patched after us stays."""
    original = Owner.method
    undo = patch(Owner, method=lambda self: "patched")
    Owner.method = lambda self: "later"
    undo()
    try:
        assert "later" == Owner().method()
    finally:
        Owner.method = original


def test_undoing_twice_does_nothing():
    """The second undo does not bring back what somebody has set since."""
    original = Owner.method
    undo = patch(Owner, method=lambda self: "patched")
    undo()
    Owner.method = lambda self: "later"
    undo()
    try:
        assert "later" == Owner().method()
    finally:
        Owner.method = original


def test_what_was_inherited_is_inherited_again():
    """The undo leaves nothing behind on a class that has the attribute from another."""

    class Heir(Owner):
        pass

    undo = patch(Heir, method=lambda self: "patched")
    assert "patched" == Heir().method()
    undo()

    assert "method" not in vars(Heir)
    assert "original" == Heir().method()


def test_what_is_not_there_is_not_patched():
    """A name that has gone is an error at once, and nothing is changed."""
    with pytest.raises(AttributeError):
        patch(Owner, method=lambda self: "patched", no_such_method=None)

    assert "original" == Owner().method()


def test_one_undo_for_several():
    """The last patch is undone first, the others also where one fails, and each once."""
    undone = []

    def fail():
        raise ValueError("cannot be undone")

    undo = together(lambda: undone.append("first"), fail, lambda: undone.append("last"))
    with pytest.raises(ValueError, match="cannot be undone"):
        undo()
    undo()

    assert ["last", "first"] == undone


def test_patches_by_name():
    """A patch is put in once, taken out once, and all of them but some at the end, the last first."""
    done, patches = [], Patches()

    def noting(name):
        done.append(f"+{name}")
        return lambda: done.append(f"-{name}")

    for name in ("one", "two", "one", "three"):
        patches.set(name, lambda name=name: noting(name))
    patches.set("two", lambda: noting("two"), is_needed=False)
    patches.take_out("two")
    assert "one" in patches
    assert "two" not in patches
    patches.take_out_all(but=("one",))
    patches.take_out_all()

    assert ["+one", "+two", "+three", "-two", "-three", "-one"] == done
