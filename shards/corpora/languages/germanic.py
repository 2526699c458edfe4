"""Captions in German, Dutch and Swedish: the adjectives agree with gender and article, in German also with case."""

from shards.corpora.languages.grammar import Language, NounPhrase, mirrored

# Noun, its dative, and gender, masculine or neuter.
_GERMAN_NOUNS = {
    "circle": ("Kreis", "Kreis", "m"),
    "square": ("Quadrat", "Quadrat", "n"),
    "triangle": ("Dreieck", "Dreieck", "n"),
    "star": ("Stern", "Stern", "m"),
    "cross": ("Kreuz", "Kreuz", "n"),
    "heart": ("Herz", "Herzen", "n"),
    "ring": ("Ring", "Ring", "m"),
    "moon": ("Mond", "Mond", "m"),
}
_GERMAN_ADJECTIVES = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "violett",
    "orange": "orangefarben",
    "black": "schwarz",
    "white": "weiß",
    "small": "klein",
    "big": "groß",
}


def _german(colour: str, shape: str, size: str, definite: bool) -> NounPhrase:
    noun, dative, gender = _GERMAN_NOUNS[shape]
    stems = [_GERMAN_ADJECTIVES[name] for name in (size, colour) if name]

    def declined(article: str, ending: str, noun: str = noun) -> str:
        return " ".join([article, *(stem + ending for stem in stems), noun])

    if definite:
        phrase = NounPhrase(declined("der" if gender == "m" else "das", "e"))
        phrase.dative = declined("dem", "en", dative)
    else:
        phrase = NounPhrase(declined("ein", "er" if gender == "m" else "es"))
        phrase.dative = declined("einem", "en", dative)
    return phrase


GERMAN = Language(
    vertical=mirrored(
        {"über": "unter", "oberhalb": "unterhalb"},
        "{a} über {b.dative}",
        "{a} oberhalb von {b.dative}",
        "{A} ist über {B.dative}",
        "{a} mit {b.dative} darunter",
        "über {B.dative} ist {a}",
    ),
    horizontal=mirrored(
        {"links": "rechts"},
        "{a} links von {b.dative}",
        "{a} links neben {b.dative}",
        "{A} ist links von {B.dative}",
        "{a} mit {b.dative} rechts davon",
        "links von {B.dative} ist {a}",
    ),
    sides={"left": "links", "right": "rechts", "top": "oben", "bottom": "unten"},
    conjunction="und",
    noun_phrase=_german,
    tempo=1.3,
)

# Noun and definite article.
_DUTCH_NOUNS = {
    "circle": ("cirkel", "de"),
    "square": ("vierkant", "het"),
    "triangle": ("driehoek", "de"),
    "star": ("ster", "de"),
    "cross": ("kruis", "het"),
    "heart": ("hart", "het"),
    "ring": ("ring", "de"),
    "moon": ("maan", "de"),
}
# Without an ending (after een, before a neuter noun), and with one.
_DUTCH_ADJECTIVES = {
    "red": ("rood", "rode"),
    "green": ("groen", "groene"),
    "blue": ("blauw", "blauwe"),
    "yellow": ("geel", "gele"),
    "purple": ("paars", "paarse"),
    "orange": ("oranje", "oranje"),
    "black": ("zwart", "zwarte"),
    "white": ("wit", "witte"),
    "small": ("klein", "kleine"),
    "big": ("groot", "grote"),
}


def _dutch(colour: str, shape: str, size: str, definite: bool) -> str:
    noun, article = _DUTCH_NOUNS[shape]
    inflected = definite or article == "de"
    adjectives = [_DUTCH_ADJECTIVES[name][inflected] for name in (size, colour) if name]
    return " ".join([article if definite else "een", *adjectives, noun])


DUTCH = Language(
    vertical=mirrored(
        {"boven": "onder", "hoger": "lager"},
        "{a} boven {b}",
        "{a} hoger dan {b}",
        "{A} staat boven {B}",
        "{a} met {b} eronder",
        "boven {B} staat {a}",
    ),
    horizontal=mirrored(
        {"links": "rechts", "linker": "rechter"},
        "{a} links van {b}",
        "{a} aan de linkerkant van {b}",
        "{A} staat links van {B}",
        "{a} met {b} rechts ervan",
        "links van {B} staat {a}",
    ),
    sides={"left": "links", "right": "rechts", "top": "bovenaan", "bottom": "onderaan"},
    conjunction="en",
    noun_phrase=_dutch,
    tempo=1.2,
)

# Noun, noun with the definite ending, and gender, common or neuter.
_SWEDISH_NOUNS = {
    "circle": ("cirkel", "cirkeln", "c"),
    "square": ("kvadrat", "kvadraten", "c"),
    "triangle": ("triangel", "triangeln", "c"),
    "star": ("stjärna", "stjärnan", "c"),
    "cross": ("kors", "korset", "n"),
    "heart": ("hjärta", "hjärtat", "n"),
    "ring": ("ring", "ringen", "c"),
    "moon": ("måne", "månen", "c"),
}
# Common, neuter, definite.
_SWEDISH_ADJECTIVES = {
    "red": ("röd", "rött", "röda"),
    "green": ("grön", "grönt", "gröna"),
    "blue": ("blå", "blått", "blå"),
    "yellow": ("gul", "gult", "gula"),
    "purple": ("lila", "lila", "lila"),
    "orange": ("orange", "orange", "orange"),
    "black": ("svart", "svart", "svarta"),
    "white": ("vit", "vitt", "vita"),
    "small": ("liten", "litet", "lilla"),
    "big": ("stor", "stort", "stora"),
}


def _swedish(colour: str, shape: str, size: str, definite: bool) -> str:
    indefinite_noun, definite_noun, gender = _SWEDISH_NOUNS[shape]
    form = 2 if definite else "cn".index(gender)
    adjectives = [_SWEDISH_ADJECTIVES[name][form] for name in (size, colour) if name]
    if definite:
        return " ".join(["den" if gender == "c" else "det", *adjectives, definite_noun])
    return " ".join(["en" if gender == "c" else "ett", *adjectives, indefinite_noun])


SWEDISH = Language(
    vertical=(
        "{a} ovanför {b}",
        "{a} över {b}",
        "{A} är ovanför {B}",
        "{a} med {b} under sig",
        "{b} nedanför {a}",
        "{b} under {a}",
        "{B} är under {A}",
        "{b} med {a} ovanför sig",
        "ovanför {B} finns {a}",
        "nedanför {A} finns {b}",
    ),
    horizontal=mirrored(
        {"vänster": "höger"},
        "{a} till vänster om {b}",
        "{a} vänster om {b}",
        "{A} är till vänster om {B}",
        "{a} med {b} till höger om sig",
        "till vänster om {B} finns {a}",
    ),
    sides={"left": "till vänster", "right": "till höger", "top": "högst upp", "bottom": "längst ner"},
    conjunction="och",
    noun_phrase=_swedish,
    tempo=1.25,
)
