"""Captions in French, Italian, Portuguese and Spanish: gender, elision, and articles joined to a preposition."""

from dataclasses import dataclass

from shards.corpora.languages.grammar import Language, NounPhrase, mirrored

# Each shape's noun and gender; the order of the shapes is the same for all languages.
_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
_GENDERS = ("m", "m", "m", "f", "f", "m", "m", "f")
_VOWELS = "aeiouéàè"


@dataclass(frozen=True)
class _Articles:
    """Articles of one gender, with the space or apostrophe before the noun, alone and preceded by de or di."""

    indefinite: tuple[str, str]
    definite: tuple[str, str]
    before_vowel: tuple[str, str] | None = None  # definite; None: the same


@dataclass(frozen=True)
class _Romance:
    """The noun phrases of one language: article, size, noun, color; or noun, color, size."""

    nouns: tuple[str, ...]
    adjectives: dict[str, tuple[str, str]]  # masculine and feminine
    articles: dict[str, _Articles]  # by gender
    size_first: bool = True

    def __call__(self, colour: str, shape: str, size: str, definite: bool) -> NounPhrase:
        number = _SHAPES.index(shape)
        gender = _GENDERS[number]
        words = [self.nouns[number], self.adjectives[colour]["mf".index(gender)]]
        if size:
            words.insert(0 if self.size_first else 2, self.adjectives[size]["mf".index(gender)])
        articles = self.articles[gender]
        alone, of = articles.definite if definite else articles.indefinite
        if definite and articles.before_vowel and words[0][0] in _VOWELS:
            alone, of = articles.before_vowel
        phrase = NounPhrase(alone + " ".join(words))
        phrase.of = of + " ".join(words)
        return phrase


FRENCH = Language(
    vertical=(
        "{a} au-dessus {b.of}",
        "{a} par-dessus {b}",
        "{A} est au-dessus {B.of}",
        "{a} avec {b} en dessous",
        "{b} en dessous {a.of}",
        "{b} sous {a}",
        "{B} est sous {A}",
        "{b} avec {a} au-dessus",
        "au-dessus {B.of} se trouve {a}",
        "en dessous {A.of} se trouve {b}",
    ),
    horizontal=mirrored(
        {"gauche": "droite"},
        "{a} à gauche {b.of}",
        "{a} sur la gauche {b.of}",
        "{A} est à gauche {B.of}",
        "{a} avec {b} à sa droite",
        "à gauche {B.of} se trouve {a}",
    ),
    sides={"left": "à gauche", "right": "à droite", "top": "en haut", "bottom": "en bas"},
    conjunction="et",
    noun_phrase=_Romance(
        nouns=("cercle", "carré", "triangle", "étoile", "croix", "cœur", "anneau", "lune"),
        adjectives={
            "red": ("rouge", "rouge"),
            "green": ("vert", "verte"),
            "blue": ("bleu", "bleue"),
            "yellow": ("jaune", "jaune"),
            "purple": ("violet", "violette"),
            "orange": ("orange", "orange"),
            "black": ("noir", "noire"),
            "white": ("blanc", "blanche"),
            "small": ("petit", "petite"),
            "big": ("grand", "grande"),
        },
        articles={
            "m": _Articles(("un ", "d'un "), ("le ", "du "), ("l'", "de l'")),
            "f": _Articles(("une ", "d'une "), ("la ", "de la "), ("l'", "de l'")),
        },
    ),
)

ITALIAN = Language(
    vertical=mirrored(
        {"sopra": "sotto"},
        "{a} sopra {b}",
        "{a} al di sopra {b.of}",
        "{A} è sopra {B}",
        "{a} con {b} sotto",
        "sopra {B} c'è {a}",
    ),
    horizontal=mirrored(
        {"sinistra": "destra"},
        "{a} a sinistra {b.of}",
        "{a} alla sinistra {b.of}",
        "{A} è a sinistra {B.of}",
        "{a} con {b} alla sua destra",
        "a sinistra {B.of} c'è {a}",
    ),
    sides={"left": "a sinistra", "right": "a destra", "top": "in alto", "bottom": "in basso"},
    conjunction="e",
    noun_phrase=_Romance(
        nouns=("cerchio", "quadrato", "triangolo", "stella", "croce", "cuore", "anello", "luna"),
        adjectives={
            "red": ("rosso", "rossa"),
            "green": ("verde", "verde"),
            "blue": ("blu", "blu"),
            "yellow": ("giallo", "gialla"),
            "purple": ("viola", "viola"),
            "orange": ("arancione", "arancione"),
            "black": ("nero", "nera"),
            "white": ("bianco", "bianca"),
            "small": ("piccolo", "piccola"),
            "big": ("grande", "grande"),
        },
        articles={
            "m": _Articles(("un ", "di un "), ("il ", "del "), ("l'", "dell'")),
            "f": _Articles(("una ", "di una "), ("la ", "della ")),
        },
    ),
    tempo=1.2,
)

PORTUGUESE = Language(
    vertical=mirrored(
        {"acima": "abaixo", "cima": "baixo"},
        "{a} acima {b.of}",
        "{a} por cima {b.of}",
        "{A} está acima {B.of}",
        "{a} com {b} por baixo",
        "acima {B.of} há {a}",
    ),
    horizontal=mirrored(
        {"esquerda": "direita", "esquerdo": "direito"},
        "{a} à esquerda {b.of}",
        "{a} do lado esquerdo {b.of}",
        "{A} está à esquerda {B.of}",
        "{a} com {b} à sua direita",
        "à esquerda {B.of} há {a}",
    ),
    sides={"left": "à esquerda", "right": "à direita", "top": "em cima", "bottom": "em baixo"},
    conjunction="e",
    noun_phrase=_Romance(
        nouns=("círculo", "quadrado", "triângulo", "estrela", "cruz", "coração", "anel", "lua"),
        adjectives={
            "red": ("vermelho", "vermelha"),
            "green": ("verde", "verde"),
            "blue": ("azul", "azul"),
            "yellow": ("amarelo", "amarela"),
            "purple": ("roxo", "roxa"),
            "orange": ("laranja", "laranja"),
            "black": ("preto", "preta"),
            "white": ("branco", "branca"),
            "small": ("pequeno", "pequena"),
            "big": ("grande", "grande"),
        },
        articles={
            "m": _Articles(("um ", "de um "), ("o ", "do ")),
            "f": _Articles(("uma ", "de uma "), ("a ", "da ")),
        },
    ),
    tempo=1.3,
)

SPANISH = Language(
    vertical=mirrored(
        {"encima": "debajo", "sobre": "bajo"},
        "{a} encima {b.of}",
        "{a} sobre {b}",
        "{A} está encima {B.of}",
        "{a} con {b} debajo",
        "encima {B.of} hay {a}",
    ),
    horizontal=mirrored(
        {"izquierda": "derecha", "izquierdo": "derecho"},
        "{a} a la izquierda {b.of}",
        "{a} al lado izquierdo {b.of}",
        "{A} está a la izquierda {B.of}",
        "{a} con {b} a su derecha",
        "a la izquierda {B.of} hay {a}",
    ),
    sides={"left": "a la izquierda", "right": "a la derecha", "top": "arriba", "bottom": "abajo"},
    conjunction="y",
    noun_phrase=_Romance(
        nouns=("círculo", "cuadrado", "triángulo", "estrella", "cruz", "corazón", "anillo", "luna"),
        adjectives={
            "red": ("rojo", "roja"),
            "green": ("verde", "verde"),
            "blue": ("azul", "azul"),
            "yellow": ("amarillo", "amarilla"),
            "purple": ("morado", "morada"),
            "orange": ("naranja", "naranja"),
            "black": ("negro", "negra"),
            "white": ("blanco", "blanca"),
            "small": ("pequeño", "pequeña"),
            "big": ("grande", "grande"),
        },
        articles={
            "m": _Articles(("un ", "de un "), ("el ", "del ")),
            "f": _Articles(("una ", "de una "), ("la ", "de la ")),
        },
        size_first=False,
    ),
    tempo=1.27,
)
