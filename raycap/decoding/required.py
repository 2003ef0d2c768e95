"""Which required words a text holds, and how many tokens it lacks to hold them all: an automaton over token ids.

A text holds a word if one of the word's spellings is among its tokens and stands by itself there: its first token does not go
on with the word in front of it, unless the text begins with it, and neither does the token behind it. So "cat" is held by a
text that ends with it, and no longer once "##fish" follows. One token may serve two words.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Words = tuple[tuple[tuple[int, ...], ...], ...]
"""Of each word its spellings as token ids. The first token of at least one goes on with nothing: it fits behind any text."""

_OTHER = -1  # in the tail of a text: all up to its last token that no word has


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text stands with the words.

    num_missing: how many more tokens make it hold every word, if no token serves two that it lacks. num_least: of the word that
    lacks most, so that fewer cannot do. next_ids: those that lacking words go on or begin with. held: words that it holds
    whatever follows. ending: words that it ends with, which a token that goes on with them takes away. tail: its last tokens.
    """

    num_missing: int
    num_least: int
    next_ids: tuple[int, ...]
    held: frozenset[int]
    ending: frozenset[int]
    tail: tuple[int, ...]


class Required:
    """The words. start: the place of the empty text. num_tokens: of all words, the most that any text lacks.

    From every place where a word is lacking, one of next_ids leads to a place with a smaller num_missing.
    """

    def __init__(self, words: Words, goes_on: Callable[[int], bool]) -> None:
        """goes_on: whether a token goes on with the word in front of it."""
        self._words, self._goes_on = words, goes_on
        self._lengths = [min(len(ids) for ids in word if not goes_on(ids[0])) for word in words]
        spellings = [ids for word in words for ids in word]
        self._ids = frozenset(token for ids in spellings for token in ids)
        self._longest = max(map(len, spellings), default=0)
        self._places: dict[tuple[frozenset[int], tuple[int, ...]], Place] = {}
        self.num_tokens = self._num_tokens(range(len(words)))
        self.start = self._place(frozenset(), ())

    def follow(self, place: Place, token: int) -> Place:
        """Where a text of this place stands with one token more."""
        held = place.held if place.ending and self._goes_on(token) else place.held | place.ending
        # One more than the longest spelling has: so a spelling fills the tail only where the text begins with it.
        tail = (*place.tail, token)[-self._longest - 1 :] if token in self._ids else (_OTHER,)
        return self._place(held, tail)

    def _place(self, held: frozenset[int], tail: tuple[int, ...]) -> Place:
        if (held, tail) not in self._places:
            self._places[held, tail] = self._read(held, tail)
        return self._places[held, tail]

    def _read(self, held: frozenset[int], tail: tuple[int, ...]) -> Place:
        def said(ids: tuple[int, ...], count: int) -> bool:
            """Whether the text ends with the first `count` of a spelling, in a place where a word may begin."""
            return tail[max(0, len(tail) - count) :] == ids[:count] and (
                count == len(tail) or not self._goes_on(ids[0])
            )

        lacking = frozenset(range(len(self._words))) - held
        ending = frozenset(word for word in lacking if any(said(ids, len(ids)) for ids in self._words[word]))
        lacking -= ending
        ways = [
            (word, ids[count], len(ids) - count)
            for word in sorted(lacking)
            for ids in self._words[word]
            for count in range(len(ids))
            if said(ids, count)
        ]
        num_missing = num_least = 0
        if ways:
            num_missing = min(
                length + self._num_tokens((lacking | ending if self._goes_on(token) else lacking) - {word})
                for word, token, length in ways
            )
            num_least = max(min(length for other, _, length in ways if other == word) for word in lacking)
        next_ids = tuple(dict.fromkeys(token for _, token, _ in ways))
        return Place(num_missing, num_least, next_ids, held, ending, tail)

    def _num_tokens(self, words: Iterable[int]) -> int:
        return sum(self._lengths[word] for word in words)
