"""What the captions of a language are made of: noun phrases, and templates for the relations of the objects."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shards.corpora.drawing import Scene, Thing

# The first IN_ORDER templates mention the first object, which is above or left of the second, first.
PHRASINGS, IN_ORDER = 10, 4


class NounPhrase(str):
    """A noun phrase in the form in which it stands alone, with the other forms that templates use."""

    dative: str  # in German
    of: str  # preceded by the preposition de or di, in Romance languages


def mirrored(opposites: Mapping[str, str], *templates: str) -> tuple[str, ...]:
    """Complete templates by those that say the same the other way round: a and b change places, words their meaning.

    Args:
        opposites: Opposite of each word that names the relation.
        templates: The `IN_ORDER` templates that mention the first object first, and one that ends with it.
    """
    exchanged = {"a": "b", "A": "B", **opposites}
    exchanged |= {other: one for one, other in exchanged.items()}
    words = sorted(opposites.keys() | opposites.values(), key=len, reverse=True)  # a word may contain another
    pattern = re.compile(rf"(?<={{)[abAB]|{'|'.join(words)}")
    reverse = [pattern.sub(lambda match: exchanged[match[0]], template) for template in templates]
    return (*templates[:IN_ORDER], *reverse[:IN_ORDER], templates[-1], reverse[-1])


# Colour, shape, size ("": not named), and whether the article is definite.
Phraser = Callable[[str, str, str, bool], str]


@dataclass(frozen=True)
class Language:
    """The grammar of the captions in one language."""

    # `PHRASINGS` templates in which {a} and {b} are the first and the second object with an indefinite article, {A} and
    # {B} with a definite one.
    vertical: tuple[str, ...]
    horizontal: tuple[str, ...]  # the same for objects side by side
    sides: dict[str, str]  # adverbial of each position of a third object
    conjunction: str  # word before the third object
    noun_phrase: Phraser  # returns the noun phrase of an object
    # Factor of the words per minute with which a caption lasts about as long as its English translation.
    tempo: float = 1.0

    def caption(self, scene: Scene, phrasing: int, sized: bool = False, size_of_first: bool = True) -> str:
        """Return a caption of a scene.

        Args:
            scene: The scene.
            phrasing: Number of the template.
            sized: Name the size of one of the first two objects, if their sizes differ.
            size_of_first: Whose size.
        """
        sized = sized and scene.first.size != scene.second.size
        first, second = (scene.first, sized and size_of_first), (scene.second, sized and not size_of_first)
        template = (self.vertical if scene.vertical else self.horizontal)[phrasing]
        text = template.format(
            a=self._noun_phrase(*first),
            b=self._noun_phrase(*second),
            A=self._noun_phrase(*first, definite=True),
            B=self._noun_phrase(*second, definite=True),
        )
        if scene.third:
            text += f" {self.conjunction} {self._noun_phrase(scene.third)} {self.sides[scene.side]}"
        return text

    def _noun_phrase(self, thing: Thing, with_size: bool = False, definite: bool = False) -> str:
        return self.noun_phrase(thing.colour, thing.shape, thing.size if with_size else "", definite)
