"""Words of generated benchmarks: keys, values and counted words, all from lists of our own.

A key is an adjective and a noun, ``amber-harbor``. Nothing a model knows about the words tells which value belongs
to which key, so an answer can only be read in the context.
"""

from __future__ import annotations

import random
from typing import Final

__all__ = ["ADJECTIVES", "NOUNS", "THINGS", "countable", "keys", "phrase"]

_ADJECTIVES: Final = """
amber ancient bitter blunt brave brief bright brisk broken calm careful cheerful clean clever coarse crimson
crisp curious damp daring dense dusty eager early earnest elegant empty faint famous fearless fierce flat foggy
fragile frozen gentle giant glossy golden graceful grand happy hasty hollow humble hungry lofty idle jolly keen
lazy lively lonely minor loyal lucky marble mellow merry mighty misty modest muddy limber nimble noble odd pale
patient plain polite proud purple quaint quick quiet rapid rare restless rough royal rusty sandy sharp shy
silent simple sleepy slender smooth snowy solemn spicy stark steady stern sturdy subtle sunny swift tame tender
timid tiny vivid wary wild wise witty young zesty
"""

_NOUNS: Final = """
acorn anchor arrow badger banner barrel basket beacon beetle bell blanket boulder bucket cabin camel candle
canoe canyon castle cedar chimney cliff clock cloud comet compass cottage crane crystal dagger desert dolphin
drum eagle ember engine falcon feather fiddle forest fountain fox garden gate glacier goat granite hammer harbor
helmet heron island jacket jungle kettle kite ladder lagoon lantern lemon lion lizard lobster magnet maple
meadow mirror monkey mountain needle oak orchard otter owl paddle parrot pebble pelican piano pigeon pillow
planet prairie quarry rabbit raven reef ribbon river robin saddle salmon shovel swallow spider statue tiger
tower trumpet tunnel turtle valley violin volcano walnut wagon whale willow window wolf
"""

_THINGS: Final = """
almond apron bagel barley biscuit brick bronze butter button cactus carpet carrot celery chalk cherry cider
cobalt cocoa copper coral cotton cradle denim diamond emerald fabric flannel garlic garnet ginger glove hazel
honey indigo ivory jasmine jewel lace lavender leather lilac linen melon mint mosaic mustard napkin nutmeg olive
onion onyx orchid oyster paper parsley pearl pepper pewter plum prism pumpkin quartz quilt radish raisin rubber
ruby saffron sapphire satin scarf scarlet sesame silver spinach syrup teapot thimble timber tulip turnip
turquoise vanilla velvet vinegar wafer wax wheat wicker zipper
"""

ADJECTIVES: Final = tuple(_ADJECTIVES.split())

NOUNS: Final = tuple(_NOUNS.split())

#: Single words of values: no key is made of them.
THINGS: Final = tuple(_THINGS.split())


def keys(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` different keys.

    Args:
        rng: Source of randomness.
        count: Number of keys.

    Returns:
        Keys as ``adjective-noun``.

    Raises:
        ValueError: If there are fewer pairs than that.
    """
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]


def phrase(rng: random.Random, count: int = 3) -> str:
    """Return a value made of words, all different.

    Args:
        rng: Source of randomness.
        count: Number of words.

    Returns:
        The words, a space between them.
    """
    return " ".join(rng.sample(THINGS, count))


def countable(rng: random.Random, count: int) -> list[str]:
    """Return words to be counted: plain ones if there are enough of them, else compounds.

    Never both, and no word is a part of another: a common word is found in an answer only if the answer names it.

    Args:
        rng: Source of randomness.
        count: Number of words.

    Returns:
        Different words.

    Raises:
        ValueError: If there are fewer compounds than that.
    """
    plain = [*ADJECTIVES, *NOUNS, *THINGS]
    if count <= len(plain):
        return rng.sample(plain, count)
    pairs = rng.sample(range(len(THINGS) * len(NOUNS)), count)
    return [f"{THINGS[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]
