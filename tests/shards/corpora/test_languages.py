"""Captions in other languages: grammar, and no text that has two English translations."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest

from shards.corpora.drawing import COLOURS, SHAPES, Scene, Thing
from shards.corpora.languages import LANGUAGES
from shards.corpora.languages.grammar import PHRASINGS
from shards.corpora.scenes import random_scene
from shards.corpora.synthesis.espeak import ACCENTS

OTHERS = [code for code in LANGUAGES if code != "en"]


def thing(words: str) -> Thing:
    size, colour, shape = words.split()
    return Thing(shape, colour, (0, 0, 0), size, 0.1, 0.0)


def scene(first: str, second: str, vertical: bool = True, third: str = "", side: str = "") -> Scene:
    centres = ((0.0, 0.0),) * 3
    return Scene(thing(first), thing(second), vertical, thing(third) if third else None, side, centres, (0, 0, 0))


UPRIGHT = scene("big red circle", "small blue star")
BESIDE = scene("small white heart", "big orange square", vertical=False)
WITH_THIRD = scene("small green moon", "small black cross", third="small purple ring", side="left")
WITH_TOP = scene("big yellow triangle", "small purple heart", vertical=False, third="small black star", side="top")

# Language, scene, phrasing, whose size is named (None: no size), caption; written by hand.
CAPTIONS = [
    ("de", UPRIGHT, 0, None, "ein roter Kreis über einem blauen Stern"),
    ("de", UPRIGHT, 2, True, "der große rote Kreis ist über dem blauen Stern"),
    ("de", UPRIGHT, 3, False, "ein roter Kreis mit einem kleinen blauen Stern darunter"),
    ("de", BESIDE, 2, None, "das weiße Herz ist links von dem orangefarbenen Quadrat"),
    ("de", BESIDE, 4, True, "ein orangefarbenes Quadrat rechts von einem kleinen weißen Herzen"),
    ("de", WITH_THIRD, 8, None, "über dem schwarzen Kreuz ist ein grüner Mond und ein violetter Ring links"),
    ("de", WITH_TOP, 7, None, "ein violettes Herz mit einem gelben Dreieck links davon und ein schwarzer Stern oben"),
    ("nl", UPRIGHT, 0, None, "een rode cirkel boven een blauwe ster"),
    ("nl", BESIDE, 0, False, "een wit hart links van een groot oranje vierkant"),
    ("nl", BESIDE, 2, True, "het kleine witte hart staat links van het oranje vierkant"),
    ("nl", WITH_THIRD, 9, None, "onder de groene maan staat een zwart kruis en een paarse ring links"),
    ("nl", WITH_TOP, 5, None,
     "een paars hart aan de rechterkant van een gele driehoek en een zwarte ster bovenaan"),
    ("sv", UPRIGHT, 0, True, "en stor röd cirkel ovanför en blå stjärna"),
    ("sv", UPRIGHT, 2, False, "den röda cirkeln är ovanför den lilla blå stjärnan"),
    ("sv", BESIDE, 0, True, "ett litet vitt hjärta till vänster om en orange kvadrat"),
    ("sv", BESIDE, 8, True, "till vänster om den orange kvadraten finns ett litet vitt hjärta"),
    ("sv", WITH_THIRD, 6, None, "det svarta korset är under den gröna månen och en lila ring till vänster"),
    ("sv", WITH_TOP, 3, None,
     "en gul triangel med ett lila hjärta till höger om sig och en svart stjärna högst upp"),
    ("fr", UPRIGHT, 0, None, "un cercle rouge au-dessus d'une étoile bleue"),
    ("fr", UPRIGHT, 2, None, "le cercle rouge est au-dessus de l'étoile bleue"),
    ("fr", UPRIGHT, 8, False, "au-dessus de la petite étoile bleue se trouve un cercle rouge"),
    ("fr", BESIDE, 9, True, "à droite du petit cœur blanc se trouve un carré orange"),
    ("fr", WITH_THIRD, 4, None, "une croix noire en dessous d'une lune verte et un anneau violet à gauche"),
    ("fr", WITH_TOP, 3, None, "un triangle jaune avec un cœur violet à sa droite et une étoile noire en haut"),
    ("it", UPRIGHT, 0, None, "un cerchio rosso sopra una stella blu"),
    ("it", UPRIGHT, 1, True, "un grande cerchio rosso al di sopra di una stella blu"),
    ("it", BESIDE, 9, True, "a destra del piccolo cuore bianco c'è un quadrato arancione"),
    ("it", WITH_THIRD, 5, None, "una croce nera al di sotto di una luna verde e un anello viola a sinistra"),
    ("it", WITH_TOP, 2, None, "il triangolo giallo è a sinistra del cuore viola e una stella nera in alto"),
    ("pt", UPRIGHT, 2, None, "o círculo vermelho está acima da estrela azul"),
    ("pt", UPRIGHT, 0, False, "um círculo vermelho acima de uma pequena estrela azul"),
    ("pt", BESIDE, 9, True, "à direita do pequeno coração branco há um quadrado laranja"),
    ("pt", WITH_THIRD, 7, None, "uma cruz preta com uma lua verde por cima e um anel roxo à esquerda"),
    ("pt", WITH_TOP, 5, None, "um coração roxo do lado direito de um triângulo amarelo e uma estrela preta em cima"),
    ("es", UPRIGHT, 2, None, "el círculo rojo está encima de la estrella azul"),
    ("es", UPRIGHT, 0, False, "un círculo rojo encima de una estrella azul pequeña"),
    ("es", BESIDE, 9, True, "a la derecha del corazón blanco pequeño hay un cuadrado naranja"),
    ("es", WITH_THIRD, 5, None, "una cruz negra bajo una luna verde y un anillo morado a la izquierda"),
    ("es", WITH_TOP, 3, None, "un triángulo amarillo con un corazón morado a su derecha y una estrella negra arriba"),
    ("en", BESIDE, 8, False, "left of the big orange square is a white heart"),
    ("en", WITH_TOP, 6, None, "the purple heart is right of the yellow triangle and a black star at the top"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "one", "phrasing", "size_of_first", "expected"), CAPTIONS)
def test_grammar(code: str, one: Scene, phrasing: int, size_of_first: bool | None, expected: str) -> None:
    assert LANGUAGES[code].caption(one, phrasing, size_of_first is not None, bool(size_of_first)) == expected


# Definite articles of every elided form, of which a scene of the table above shows only one.
@pytest.mark.parametrize(
    ("code", "alone", "of"),
    [("fr", "l'anneau rouge", "de l'anneau rouge"), ("it", "l'anello rosso", "dell'anello rosso"),
     ("es", "el anillo rojo", "del anillo rojo"), ("pt", "o anel vermelho", "do anel vermelho")],
)  # fmt: skip
def test_definite_articles_before_a_vowel(code: str, alone: str, of: str) -> None:
    phrase = LANGUAGES[code].noun_phrase("red", "ring", "", True)
    assert (phrase, phrase.of) == (alone, of)


def test_adjectives_agree_with_every_noun() -> None:
    """The forms of the adjective and the article follow from the gender of the noun alone."""
    for code in ("fr", "it", "pt", "es"):
        genders = defaultdict(set)
        for shape in SHAPES:
            article = LANGUAGES[code].noun_phrase("white", shape, "big", False).split()[0]
            white = next(word for word in LANGUAGES[code].noun_phrase("white", shape, "", False).split() if "b" in word)
            genders[article].add(white)
        assert len(genders) == 2
        assert all(len(forms) == 1 for forms in genders.values()), (code, genders)


@pytest.mark.parametrize("code", LANGUAGES)
def test_noun_phrases_name_color_shape_and_size(code: str) -> None:
    meanings = defaultdict(set)
    for colour in COLOURS:
        for shape in SHAPES:
            for size in ("", "small", "big"):
                for definite in (False, True):
                    phrase = LANGUAGES[code].noun_phrase(colour, shape, size, definite)
                    assert phrase == " ".join(phrase.split())
                    meanings[phrase].add((colour, shape, size))
    assert len(meanings) == 2 * 3 * len(COLOURS) * len(SHAPES)
    assert all(len(meaning) == 1 for meaning in meanings.values())


@pytest.mark.parametrize("code", OTHERS)
def test_a_caption_and_its_english_translation_determine_each_other(code: str) -> None:
    """So two scenes share a caption only if they share one in English, and no two phrasings are the same."""
    chance = random.Random(1)
    english, translated = {}, {}
    for n in range(1500):
        drawn = random_scene(0, "train", str(n))
        flipped = replace(drawn, vertical=not drawn.vertical, third=None)
        for one in (drawn, replace(drawn, third=None), replace(drawn, first=drawn.second, second=drawn.first), flipped):
            phrasing, sized, of_first = chance.randrange(PHRASINGS), chance.random() < 0.5, chance.random() < 0.5
            text, original = (LANGUAGES[which].caption(one, phrasing, sized, of_first) for which in (code, "en"))
            assert english.setdefault(text, original) == original, text
            assert translated.setdefault(original, text) == text, original
    assert len(english) > 4000


def test_no_text_has_two_meanings_in_two_languages() -> None:
    meanings: dict[str, str] = {}
    for n in range(400):
        one = random_scene(0, "train", str(n))
        for code in LANGUAGES:
            english = LANGUAGES["en"].caption(one, n % PHRASINGS)
            assert meanings.setdefault(LANGUAGES[code].caption(one, n % PHRASINGS), english) == english
    assert len(meanings) > 7.5 * 390


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_third_object_is_where_the_scene_has_it(code: str) -> None:
    texts = {}
    for vertical, sides in ((True, ("left", "right")), (False, ("top", "bottom"))):
        for side in sides:
            one = scene("big red circle", "small blue star", vertical, "small green heart", side)
            texts[side] = LANGUAGES[code].caption(one, 0)
            without = LANGUAGES[code].caption(replace(one, third=None), 0)
            assert texts[side].startswith(f"{without} {LANGUAGES[code].conjunction} ")
    assert len({text.rsplit(" ", 2)[-1] for text in texts.values()}) == 4


def test_every_language_has_ten_phrasings_and_a_voice() -> None:
    assert len(LANGUAGES) >= 6
    assert LANGUAGES.keys() == ACCENTS.keys()
    for language in LANGUAGES.values():
        assert len(set(language.vertical)) == len(set(language.horizontal)) == PHRASINGS
