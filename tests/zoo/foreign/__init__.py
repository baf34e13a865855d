"""Decoders that no library wrote, in the styles found in the wild: each its own file, its cache as its style has it."""

from tests.zoo.foreign import (
    alibi,
    blhd,
    capped,
    cross,
    differential,
    einsum,
    flex,
    late_rotary,
    meta,
    mha,
    nano,
    orders,
    packed,
    sinks,
    static,
    t5bias,
)
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
        late_rotary.SUBJECT,
        t5bias.SUBJECT,
        differential.SUBJECT,
        mha.SUBJECT,
        cross.SUBJECT,
        flex.GIVEN,
        flex.INSIDE,
        orders.SCALED_MASK,
        orders.VALUE_FIRST,
        orders.GROUPED,
        orders.MERGED,
    )
}
"""Every decoder by its name."""
