from __future__ import annotations

import pytest
import torch

from alignfast.attacks import PRESETS, InputDiversity, SignStep
from alignfast.attacks.catalog import Entry, catalog, paper_of, text_of


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    return {entry.name: entry for entry in catalog()}


def test_every_preset_is_listed_with_its_paper(entries: dict[str, Entry]) -> None:
    assert list(entries) == sorted(PRESETS)
    for entry in entries.values():
        assert entry.paper, entry.name
        assert entry.components, entry.name
        assert entry.passes >= entry.copies >= 1


def test_what_a_step_costs(entries: dict[str, Entry]) -> None:
    assert (entries["pgd"].copies, entries["pgd"].passes) == (1, 1)
    assert entries["pgd"].components == ("random start", "SignStep()")
    assert (entries["sinifgsm"].copies, entries["sinifgsm"].passes) == (5, 5)
    assert (entries["vmifgsm"].copies, entries["vmifgsm"].passes) == (1, 6)


def test_texts_name_what_is_unusual() -> None:
    assert text_of(InputDiversity()) == "InputDiversity()"
    assert text_of(InputDiversity(1.1, copies=2)) == "InputDiversity(rate=1.1, copies=2)"
    assert text_of(SignStep(nesterov=True)) == "SignStep(nesterov=True)"


def test_papers_are_what_a_docstring_has_with_a_year() -> None:
    def preset(source: object) -> None:
        """A thing (with a remark), of someone (A and B,
        CVPR 2021, eq. 2); more (2)."""

    assert paper_of(preset) == "A and B, CVPR 2021, eq. 2"  # type: ignore[arg-type]
    assert torch.get_default_device() == torch.device("cpu")
