"""METEOR 1.5 through pycocoevalcap's jar, for tokenised captions. Owns its Java process and its paraphrase table.

pycocoevalcap's own wrapper lets Java load 5.3 million paraphrases, which takes 8 s and 2 GB, and dies with "could not
convert string to float" when Java does. Here Java loads only the paraphrases that occur in the captions. No other
entry can match, so scores stay equal to the last digit.
"""

import gzip
import re
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import IO

from pycocoevalcap.meteor import meteor as upstream

from raycap.errors import RaycapError
from raycap.metrics.java import describe_exit, java_command, java_environment, last_line

JAR = Path(str(upstream.__file__)).with_name(upstream.METEOR_JAR)
PARAPHRASES = JAR.parent / "data" / "paraphrase-en.gz"
MAX_HEAP_MIB = 2048  # upstream's; the filtered table of 400 captions needs 100
READ_BYTES = 1 << 16  # of compressed table at a time; larger blocks fall out of the processor's cache

# An entry is three lines: probability, phrase, paraphrase. Those of one phrase are neighbours: one match takes all.
PHRASE_GROUP = re.compile(rb".*+\n(.*+\n).*+\n(?:.*+\n\1.*+\n)*+")
WORD_RUN = re.compile(rb"[a-z0-9]+")
DOTS = re.compile(rb"\.\.+")  # these part words, single dots inside a word do not
NUM_WORDS = 4  # of a phrase are looked at: seven of eight phrases are no longer


def write_paraphrases(captions: Iterable[str], path: Path) -> None:
    """Writes the part of METEOR's paraphrase table that can match in these captions, gzipped, in the table's order.

    captions: tokenised, lower case. An entry matches only where both its phrases stand in captions word for word, so it
    is kept if the first words of both do. METEOR splits captions further, at punctuation alone, and deletes the dots of
    abbreviations: words are compared as runs of ASCII letters and digits without single dots. That keeps an entry too
    many here and there, and drops none that could match.
    """
    known = {b""}  # phrases of punctuation alone
    for caption in captions:
        words = _words(_without_separator(caption).encode())
        known.update(
            b" ".join(words[start : start + length])
            for length in range(1, NUM_WORDS + 1)
            for start in range(len(words))
        )
    with gzip.open(path, "wb", compresslevel=1) as table:
        for entries, phrase in _phrase_groups():
            if b" ".join(_words(phrase)[:NUM_WORDS]) in known:
                lines = entries.split(b"\n")
                for probability, other in zip(lines[0:-1:3], lines[2:-1:3], strict=True):
                    if b" ".join(_words(other)[:NUM_WORDS]) in known:
                        table.write(b"%b\n%b%b\n" % (probability, phrase, other))


def _words(text: bytes) -> list[bytes]:
    if b"." in text:
        text = DOTS.sub(b" ", text).replace(b".", b"")
    return WORD_RUN.findall(text)


def _phrase_groups() -> Iterator[tuple[bytes, bytes]]:
    """The table in pieces: neighbouring entries of one phrase, and that phrase, both ending in a newline."""
    unzip = zlib.decompressobj(wbits=31)  # 31: gzip's header
    rest = b""
    with open(PARAPHRASES, "rb") as table:
        while block := table.read(READ_BYTES):
            data = rest + unzip.decompress(block)
            end = 0
            for group in PHRASE_GROUP.finditer(data):
                yield group[0], group[1]
                end = group.end()
            rest = data[end:]
    if rest or not unzip.eof:
        raise RaycapError(
            f"METEOR's paraphrase table ends inside an entry, in '{PARAPHRASES}'; reinstall pycocoevalcap"
        )


def meteor(
    candidates: Sequence[str], references: Sequence[Sequence[str]], paraphrases: Path
) -> tuple[float, list[float]]:
    """The corpus score and one score a candidate, range 0 to 1; paraphrases: what write_paraphrases wrote.

    Captions are tokenised and hold no line break. An empty candidate scores 0 and counts in the corpus score with its
    reference's length, as upstream. Raises RaycapError if Java ends early.
    """
    errors = paraphrases.with_name("meteor_errors.txt")
    arguments = ["-jar", str(JAR), "-", "-", "-stdio", "-l", "en", "-norm", "-a", paraphrases.name]
    command = java_command(*arguments, max_heap_mib=MAX_HEAP_MIB)
    with open(errors, "wb") as stderr:
        java = subprocess.Popen(
            command,
            cwd=paraphrases.parent,
            env=java_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert java.stdin is not None
    assert java.stdout is not None
    try:
        # From a thread: Java answers while it reads, and two full pipes would wait for each other.
        lines = [_score_line(c, r) for c, r in zip(candidates, references, strict=True)]
        Thread(target=_write, args=(java.stdin, lines), daemon=True).start()
        statistics = [_read(java, java.stdout, errors, f"caption {i} of {len(lines)}") for i in range(len(lines))]
        Thread(target=_write, args=(java.stdin, ["EVAL ||| " + " ||| ".join(statistics)]), daemon=True).start()
        scores = [float(_read(java, java.stdout, errors, f"score {i} of {len(lines)}")) for i in range(len(lines))]
        return float(_read(java, java.stdout, errors, "the corpus score")), scores
    finally:
        java.kill()
        java.wait()


def _score_line(candidate: str, references: Sequence[str]) -> str:
    """One request of METEOR's line protocol, whose separator must not occur in a caption."""
    return " ||| ".join(["SCORE", *map(_without_separator, (*references, candidate))])


def _without_separator(caption: str) -> str:
    return caption.replace("|||", "").replace("  ", " ")  # upstream's words, which it applies to candidates only


def _write(pipe: IO[bytes], lines: list[str]) -> None:
    try:
        pipe.write("".join(line + "\n" for line in lines).encode())
        pipe.flush()
    except OSError:
        pass  # Java is gone: whoever reads its answers finds that out and says so


def _read(java: subprocess.Popen[bytes], answers: IO[bytes], errors: Path, what: str) -> str:
    line = answers.readline().decode().strip()
    if line and not line.startswith("Error"):
        return line
    if line:
        raise RaycapError(f"METEOR refused {what}: '{line}', in '{JAR}'; reinstall pycocoevalcap")
    raise RaycapError(
        f"METEOR's Java process ended with {describe_exit(java.wait())} at {what}, its last words were "
        f"{last_line(errors)}, in '{JAR}'; check that {MAX_HEAP_MIB} MiB of memory are free and run this again"
    )
