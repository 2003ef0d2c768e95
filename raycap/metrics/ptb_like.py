"""A pure-Python word splitter for scoring inside a training run. Owns no metric.

Published numbers come from coco.py, which runs Stanford's PTB tokenizer in Java as pycocoevalcap does.
"""

import re

# pycocoevalcap drops brackets by their names in capitals; the tokenizer has lower-cased them by then, so they stay.
BRACKETS = {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
BRACKETS_AND_QUOTES = str.maketrans(BRACKETS | {"\u2019": "'", "\u2018": "`", '"': " "})
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
TWO_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
TOKEN = re.compile(
    r"-[lr][rsc]b-"
    r"|n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)"
    r"|(?<!\w)(?:[a-z]\.){2,}"  # u.s.  p.m.
    r"|(?<!\w)(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ft|inc|co|corp|[a-hj-z]|no(?=\. ?\d))\.(?!\w)"
    r"|\w+(?:[-./]\w+|(?<!\d)'\w+|(?<=\d)[,:](?=\d)\w+)*"  # words with inner hyphens and apostrophes, 1,000  5:30  1/2
    r"|[#@][a-z]\w*|[?!]{2,}|[$%#@&*+=/\\|~^<>]"
)


def ptb_like(text: str) -> list[str]:
    """The words of a caption in lower case, without punctuation, contractions split ("isn't" -> "is", "n't").

    Equals the Java tokenizer with pycocoevalcap's punctuation list on plain captions: letters, digits, the usual
    punctuation, brackets, contractions, a few abbreviations. It knows none of the Java tokenizer's rules for
    addresses, emoticons, markup or rare abbreviations.
    """
    text = text.lower().translate(BRACKETS_AND_QUOTES)
    text = TWO_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return TOKEN.findall(CONTRACTION.sub(r" \1", text))
