"""The types that span the spellings, through all checks; `python -m tests.zoo` runs every type."""

from __future__ import annotations

import pytest

from tests.zoo.sweep import examine

#: Type to status; what is true today, so that a change either way is noticed.
EXPECTED: dict[str, str] = {
    "llama": "compressed",
    "gpt2": "compressed",
    "gptj": "compressed",
    "bert": "compressed",
    "bart": "compressed",
    "opt": "compressed",
    "mamba": "nothing to compress",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_type_is_what_the_table_says_and_passes_every_check(name: str) -> None:
    row = examine(name)
    assert row.problems == []
    assert row.status == EXPECTED[name], row.reasons
