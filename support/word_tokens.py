"""
The tokens of NLTK's word_tokenize (3.9.3 to 3.10.0) for text in lower case. Mem0's BLEU-1, which the authors of
Memory-R1 use, counts them. NLTK needs a downloaded model; this file contains the part of it that such text can reach.

    word_tokens("It's 5 p.m. Go!")          # it 's 5 p.m . go !

Punkt (Kiss and Strunk, 2006) finds the sentences, because a period is a token only at the end of a sentence. It ends no
sentence after an abbreviation, nor between a number or single letter and a word in lower case. Then the rules of the
Penn Treebank split each sentence into words. tests/test_word_tokens.py compares with NLTK.
"""
import re

PAD = r" \g<0> "
RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[«“‘„]|`+", PAD), ('^"', "``"), ("``", PAD), (r"""([ (\[{<])(?:"|'')""", r"\1 `` "),
    (r"(?i)'(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"' \1"),
    (r"""([^.])\.([\])}>"'»”’ ]*+)\s*$""", r"\1 . \2 "),  # a final period
    (r"([:,])(\D)", r" \1 \2"), ("[:,]$", PAD), (r"\.{2,}|[;@#$%&?!\u2012-\u2015]", PAD), ("([^'])' ", r"\1 ' "),
    (r"--|[][(){}<>*]", PAD), (r"\A|\Z", " "), ("[»”’]", PAD), ("''|\"", " '' "), (r"\s+", " "),
    ("([^' ])('[smd]|') ", r"\1 \2 "), ("([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"(?i)\b(can(?=not)|d(?='ye)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|more(?='n)|wan(?=na\s))"
     r"(not|'ye|me|na|ta|'n)\b", r" \1 \2 "), (r"(?i) ('t)(is)\b", r" \1 \2 "), (r"(?i) ('t)(was)\b", r" \1 \2 "))]

INK = r"(?a:\S)"  # white space is that of ASCII
NON_WORD = r"""[)";}\]*:@'({\[?!]"""
MULTI = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
WORD = re.compile(rf"{MULTI}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=,?(?:\s|$|{NON_WORD}|{MULTI}))|\S")
# A possible end of a sentence: the last one in each word, and one at the beginning of a word; what follows it
END = re.compile(rf"(?:(?<!{INK})(?:(?=[.?!]{NON_WORD})|{INK}*)|(?<=(?<!{INK})[.?!])(?={NON_WORD}){INK}*)"
                 rf"[.?!](?=({NON_WORD}|\s+(\S+)))")
CLOSING = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)  # belongs to the sentence before it
NUMBER_OR_LETTER = re.compile(r"-?[.,]?\d[\d,.-]*\.|[^\W\d]\.")
ABBREVIATIONS = frozenset("""
a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co col colo
conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga gen h h.c h.f h.m
i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c m.j maj messrs mg mich minn mr
mrs ms n n.c n.d n.h n.j n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa ph.d prof r r.a r.h r.i r.j r.k r.t rep reps
s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn tues u.k u.n u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va
w.w wash wed wis yr""".split()) | {". . "}


def ends_sentence(context: str) -> bool:
    """Whether a sentence ends between the words of a short context: "dogs. he" yes, "dr. who" and "1. go" no."""
    words = [word for line in context.split("\n") for word in WORD.findall(line)]
    return any(
        word in (".", "?", "!") or word.endswith(".") and not word.endswith("..")
        and not {word[:-1], word[:-1].split("-")[-1]} & ABBREVIATIONS
        and not (NUMBER_OR_LETTER.fullmatch(word) and (after[0].islower() or after in {*";:,.!?"}))
        for word, after in zip(words, words[1:], strict=False))


def sentences(text: str) -> list[str]:
    """'he said "go." dr. who went.' -> ['he said "go."', 'dr. who went.']"""
    found, start, text = [], 0, text.rstrip()
    for end in END.finditer(text):
        if ends_sentence(text[max(0, end.start() - 1):end.end()] + end[1]):
            begin = end.end() if end[2] is None else end.start(2)
            closing = CLOSING.match(text, begin)
            found.append(text[start:begin + len(closing[0].rstrip()) if closing else end.end()])
            start = closing.end() if closing else begin
    return [*found, text[start:]]


def word_tokens(text: str) -> list[str]:
    """Split a text without surrounding white space into tokens in lower case. "I'm." -> ["i", "'m", "."]"""
    found = []
    for sentence in sentences(text.lower()):
        for pattern, replacement in RULES:
            sentence = pattern.sub(replacement, sentence)
        found += sentence.split()
    return found
