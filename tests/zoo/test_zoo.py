"""The types that span the spellings, through all checks; `python -m tests.zoo` runs every type."""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.sweep import examine

#: Type to status; what is true today, so that a change either way is noticed.
EXPECTED: dict[str, str] = {
    "llama": "compressed",
    "gpt2": "compressed",  # heads packed in one projection, learned positions
    "cohere2": "compressed",  # layers with a sliding window among others
    "llama4_text": "compressed",  # chunks counted from the padding, under a cache that drops old entries
    "gptj": "compressed",  # written out, interleaved rotary embedding
    "codegen": "compressed",  # the mask is scaled with the logits
    "bloom": "compressed",  # ALiBi by baddbmm, heads flattened into the batch
    "falcon": "compressed",  # one key head
    "bert": "compressed",  # an encoder as a decoder
    "bart": "compressed",
    "bigbird_pegasus": "compressed",
    "deepseek_v2": "compressed",  # multi-head latent attention
    "deepseek_v3": "compressed",
    "flint": "compressed",  # attention sinks
    "gemma2": "compressed",  # soft cap
    "ernie4_5_moe": "compressed",  # experts
    "bamba": "compressed",  # state-space layers among others
    "falcon_mamba": "nothing to compress",
    "doge": "refused",  # the mask is computed from the cached values
    "deepseek_v4": "refused",  # what is cached is pooled over several tokens
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_type_is_what_the_table_says_and_passes_every_check(name: str) -> None:
    if name not in CONFIG_MAPPING and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip(f"transformers {transformers.__version__} has no type {name}")
    row = examine(name)
    assert row.problems == []
    assert row.status == EXPECTED[name], row.reasons
