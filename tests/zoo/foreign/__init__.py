"""Decoders that no library wrote, in the styles found in the wild: each its own file, its cache as its style has it."""

from tests.zoo.foreign import alibi, blhd, capped, einsum, meta, nano, packed, sinks, static
from tests.zoo.subject import Subject

__all__ = ["FOREIGN"]

FOREIGN: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        nano.SUBJECT,
        blhd.SUBJECT,
        einsum.SUBJECT,
        meta.SUBJECT,
        static.SUBJECT,
        alibi.SUBJECT,
        capped.SUBJECT,
        sinks.SUBJECT,
        packed.SIDE_BY_SIDE,
        packed.STACKED,
    )
}
"""Every decoder by its name."""
