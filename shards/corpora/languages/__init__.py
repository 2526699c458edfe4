"""The languages of the scenes' captions: `LANGUAGES` maps a code to its grammar."""

from shards.corpora.languages.english import ENGLISH
from shards.corpora.languages.germanic import DUTCH, GERMAN, SWEDISH
from shards.corpora.languages.grammar import Language
from shards.corpora.languages.romance import FRENCH, ITALIAN, PORTUGUESE, SPANISH

LANGUAGES: dict[str, Language] = {
    "en": ENGLISH,
    "de": GERMAN,
    "es": SPANISH,
    "fr": FRENCH,
    "it": ITALIAN,
    "nl": DUTCH,
    "pt": PORTUGUESE,
    "sv": SWEDISH,
}
