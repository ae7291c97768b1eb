"""The search for changes that no test notices, and the list of those that none could."""

from __future__ import annotations

import ast

from tests import mutation
from tests.mutation import AREAS, Mutant, Only, Reach, changes, mutants, reviewed


def test_every_reviewed_change_is_one_that_is_tried_and_says_why():
    names = {mutant.name for area in AREAS.values() for mutant in mutants(area)}
    entries = reviewed()
    assert set(entries) <= names, sorted(set(entries) - names)
    assert all(len(why) > 10 for why in entries.values())


def test_every_test_of_an_area_is_there():
    for area in AREAS.values():
        for name in area.tests:
            assert (mutation.ROOT / "tests" / name.partition("::")[0]).is_file()


def source(text: str, monkeypatch) -> None:
    class Given(mutation.Source):
        def __init__(self, module: str) -> None:
            self.path, self.text = mutation.ROOT / "x.py", text
            self.tree = ast.parse(text)
            self.statements = [n for n in ast.walk(self.tree) if isinstance(n, ast.stmt)]
            self.changes = tuple(changes(self.tree))

    monkeypatch.setattr(mutation, "source_of", Given)


TEXT = """LIMIT = 3
def f(x, y=4):
    if (x >
            5):
        return x
    return [
        y + 6,
    ]
@frozen(True)
class C: pass
"""


def test_a_change_is_known_by_the_function_that_it_is_in(monkeypatch):
    source(TEXT, monkeypatch)
    made = {str(each): each for each in (Mutant("x", n) for n in range(10))}
    found = {name: (m.statement, m.is_in_function) for name, m in made.items()}
    assert found["x.py:1: x | LIMIT = 3 | 3 → 4"] == (range(1, 2), False)
    assert found["x.py:2: x.f | def f(x, y=4): | 4 → 5"] == (range(2, 3), False)
    assert found["x.py:4: x.f | 5): | 5 → 6"] == (range(3, 5), True)
    assert found["x.py:9: x.C | @frozen(True) | True → False"] == (range(9, 10), False)
    assert found["x.py:7: x.f | y + 6, | 6 → 7"] == (range(6, 9), True)


def test_the_tests_that_reach_a_line_come_first_and_take_a_minute(monkeypatch):
    source(TEXT, monkeypatch)
    seconds = {"slow": 50.0, "quick": 1.0, "longer": 20.0, "other": 2.0}
    path = str(mutation.ROOT / "x.py")
    reach = Reach({(path, 3): ["slow", "quick", "longer"]}, seconds)
    at = {each.change.what: each for each in (Mutant("x", n) for n in range(10))}
    assert reach.order(at["5 → 6"]) == ["quick", "longer", "slow"]
    assert reach.order(at["3 → 4"]) == ["quick", "other", "longer", "slow"], "by all, at import"
    assert reach.order(at["6 → 7"]) == ["slow", "longer"], "in a process that a test starts"


def test_tests_are_run_in_the_order_that_is_asked_for():
    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    items = [Item(name) for name in "abc"]
    Only(["c", "a"]).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["c", "a"]


def test_a_changed_module_is_imported_in_place_of_its_own():
    mutant = mutants(mutation.Area(("exporting.wire",), ()))[0]
    assert mutant.get_code(mutant.module) != compile(mutant.source.tree, "x.py", "exec")
    assert mutant.find_spec(mutant.module).loader == mutant
    assert mutant.find_spec("kdsurgeon.errors") is None
