"""Object words: which forms of a name are found, and which words are others though they look like one of its forms."""

import pytest

from aspo.rewards.object_words import ObjectVocabulary, load_vocabulary
from aspo.world.scenes import COLOURS, SHAPES

PLURALS = {
    **{"car": "cars", "giraffe": "giraffes", "vase": "vases", "horse": "horses", "shoe": "shoes", "plane": "planes"},
    **{"bus": "buses", "glass": "glasses", "wine glass": "wine glasses", "lens": "lenses", "cross": "crosses"},
    **{"box": "boxes", "fox": "foxes", "topaz": "topazes"},
    **{"bench": "benches", "couch": "couches", "sandwich": "sandwiches", "watch": "watches", "torch": "torches"},
    **{"brush": "brushes", "dish": "dishes", "fish": "fishes"},
    **{"tomato": "tomatoes", "potato": "potatoes", "buffalo": "buffaloes", "piano": "pianos", "avocado": "avocados"},
    **{"puppy": "puppies", "baby": "babies", "berry": "berries", "key": "keys", "donkey": "donkeys", "tie": "ties"},
    **{"man": "men", "woman": "women", "child": "children", "policeman": "policemen"},
    **{"knife": "knives", "shelf": "shelves", "scarf": "scarves", "calf": "calves", "wolf": "wolves"},
    **{"mouse": "mice", "goose": "geese", "ox": "oxen", "hot dog": "hot dogs", "bookshelf": "bookshelfs"},
}


@pytest.mark.parametrize(("name", "plural"), PLURALS.items())
def test_plurals_of_names_are_found(name, plural):
    vocabulary = ObjectVocabulary([name])
    (one, several) = vocabulary.words(f"One {name}, two {plural}.")
    assert (one.entry, several.entry, several.end - several.start) == (name, name, len(plural))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *[("man", "manes"), ("ski", "skies"), ("car", "cares"), ("van", "vanes"), ("can", "canes"), ("cap", "capes")],
        *[("cloth", "clothes"), ("pan", "panes"), ("bath", "bathes"), ("bus", "bused"), ("box", "boxer")],
    ],
)
def test_another_word_is_not_taken_for_a_plural(name, word):
    assert ObjectVocabulary([name]).mentions(f"With {word} there.") == []


def test_a_sky_is_not_skis():
    vocabulary = ObjectVocabulary(["person, man", "zebra", "skis, ski", "sky"])
    named = vocabulary.mentions("Zebras with manes under blue skies; a man on skis, another with one ski.")
    assert named == ["zebra", "sky", "person", "skis", "skis"]


def test_the_embedded_world_s_words_are_found_in_every_form():
    vocabulary = load_vocabulary("world")
    assert sorted(vocabulary.entries) == sorted([*SHAPES, *COLOURS])
    for colour in COLOURS:
        assert vocabulary.mentions(f"A {colour} ring, two {colour}s.") == [colour, "ring", colour]
    for shape in SHAPES:
        assert vocabulary.mentions(f"A {shape}, two {PLURALS.get(shape, shape + 's')}.") == [shape, shape]
