"""A plugin of pytest that runs few combinations of each test's parameters, with every value of every parameter.

python -m pytest -p tests.covering
"""

from collections import Counter

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = [item for group in by_function(items).values() for item in covering(group)]
    found, kept = len(items), {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
    config.get_terminal_writer().line(f"covering: {len(items)} of {found} tests")


def by_function(items):
    found = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return found


def covering(items):
    """Few items of one test function that have every value of every parameter between them."""
    values = {id(item): values_of(item) for item in items}
    missing = set().union(*values.values())
    chosen, uses = [], Counter()
    while missing or not chosen:
        # Of equally good ones that with the values that are rarest so far, and then the first: the choice is always
        # the same.
        best = max(items, key=lambda item: (len(values[id(item)] & missing), -sum(uses[v] for v in values[id(item)])))
        chosen.append(best)
        missing -= values[id(best)]
        uses.update(values[id(best)])
    return chosen


def values_of(item):
    # By identity, as values may be tensors; combinations share them.
    return {(name, id(value)) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else set()
