"""Descriptions -> motion phrases: verbs with what takes part in the motion (HAWK section 4.3, Eq. 6-7), by dependency parsing.

Two answers for every text.  *direct* is the released code: each verb with the head words of its direct subjects and objects.  *all* adds
the indirect ones of Eq. 7.  Both work on a plain list of words, so the rules are tested without a model, and on the labels of ClearNLP
(en_core_web_sm) as well as of Universal Dependencies.
"""
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import spacy

from hawk_jax.config import HawkError

EMBEDDED = Path(__file__).parent / "embedded" / "spacy"

# Universal Dependencies -> ClearNLP, where one label says the same; subtypes not listed lose their suffix.
SAME = {"nsubj:pass": "nsubjpass", "obj": "dobj", "iobj": "dative", "obl:agent": "agent", "compound:prt": "prt", "acl:relcl": "relcl",
        "obl:unmarked": "npadvmod", "obl:npmod": "npadvmod", "obl:tmod": "npadvmod"}
SUBJECTS = ("nsubj", "nsubjpass")
OBJECTS = ("dobj", "pobj", "obj")        # the released list; a pobj never hangs on a verb
NO_PREDICATE = ("amod", "compound", "case", "mark", "cc", "prep", "agent", "aux", "auxpass")   # "parked cars": a state, not a motion
RELATIVE = ("who", "whom", "which", "that")


class Word(NamedTuple):
    """One token of a parsed text."""
    text: str
    pos: str                             # universal part of speech
    dep: str                             # label of the arc to its head, ClearNLP or UD
    head: int                            # index of the head; its own index for a root


class Parse:
    """Words with their labels made one set, and their children in order."""

    def __init__(self, words: Iterable[Word]):
        self.words = [word._replace(dep=SAME.get(word.dep, word.dep.partition(":")[0])) for word in words]
        self.children: list[list[int]] = [[] for _ in self.words]
        for i, word in enumerate(self.words):
            if word.head != i:
                self.children[word.head].append(i)

    def having(self, head: int, *labels: str) -> list[int]:
        return [i for i in self.children[head] if self.words[i].dep in labels]

    # -------------------------------------------------------------------------------------------- released code
    def direct(self) -> list[str]:
        """A phrase for each verb: direct subjects, verb form, direct objects; head words only, several joined by "and"."""
        return [self._phrase([self._texts(self.having(i, *SUBJECTS)), word.text, self._texts(self.having(i, *OBJECTS))])
                for i, word in enumerate(self.words) if word.pos == "VERB"]

    @staticmethod
    def _phrase(parts: list[str]) -> str:
        return " ".join(part for part in parts if part)

    def _texts(self, entities: Iterable[int]) -> str:
        return " and ".join(self.words[i].text for i in entities)

    def _lower(self, *indices: int) -> str:
        return " ".join(self.words[i].text.lower() for i in indices)

    # -------------------------------------------------------------------------------------------- with indirect arguments
    def all(self) -> list[str]:
        """A phrase {S and Si, V, Oi, O, Oi with preposition} for each verb that is a predicate.

        Si: the subject of the verb it is joined to (conjunct, open complement, adverbial clause without a subject of its own), the
        object where that verb has one ("makes him fall"), the noun it modifies ("a man carrying a bag", "who falls"); the agent of a
        passive stays behind the verb with its "by".  Oi: datives, and nouns joined by a preposition.  Conjoined nouns all count, a
        relative pronoun stands for its noun (for the subject, where a whole clause is meant), V takes its particle along.  Verbs before
        a noun ("parked cars") are left out.
        """
        return [self._phrase([
            self._texts(self._subjects(i)), self._lower(i, *self.having(i, "prt")),
            self._texts(self._nouns(self._bare(i, "dative"))), self._texts(self._nouns(self.having(i, "dobj"))), *self._obliques(i),
        ]) for i, word in enumerate(self.words) if word.pos == "VERB" and word.dep not in NO_PREDICATE]

    def _bare(self, verb: int, label: str) -> list[int]:
        """Children that are nouns themselves; in ClearNLP a dative or an agent may also be a preposition."""
        return [i for i in self.having(verb, label) if not self.having(i, "pobj", "case")]

    def _nouns(self, entities: Iterable[int]) -> list[int]:
        """Each entity with its conjuncts; relative pronouns replaced by their noun."""
        found = []
        for i in entities:
            noun = self._antecedent(i)
            found += [i, *self._nouns(self.having(i, "conj"))] if noun == i else self._modified(noun)
        return found

    def _modified(self, head: int) -> list[int]:
        """What a clause at `head` speaks about: the noun, or the subject of the verb."""
        return self._subjects(head) if self.words[head].pos in ("VERB", "AUX") else [head]

    def _antecedent(self, entity: int) -> int:
        if self.words[entity].text.lower() not in RELATIVE:
            return entity
        i = entity
        while self.words[i].dep != "relcl":
            if self.words[i].head == i:
                return entity
            i = self.words[i].head
        return self.words[i].head

    def _subjects(self, verb: int) -> list[int]:
        own = self.having(verb, *SUBJECTS)
        if self.having(verb, "expl"):
            own += self.having(verb, "attr")                     # ClearNLP: "there is a car"
        if own:
            return self._nouns(own)
        word = self.words[verb]
        if word.head == verb:
            return []
        if word.dep in ("acl", "relcl"):
            return self._modified(word.head)
        if word.dep == "xcomp" and (objects := self.having(word.head, "dobj")):
            return self._nouns(objects)
        # "by running", "instead of running": through the prepositions
        return self._subjects(word.head) if word.dep in ("conj", "xcomp", "advcl", "pcomp", "prep") else []

    def _obliques(self, verb: int) -> list[str]:
        """Nouns behind a preposition, with it: "on pavement", "out of car"."""
        found = []
        for i in self.children[verb]:
            if self.words[i].dep in ("prep", "agent", "dative") and self.having(i, "pobj", "prep"):
                found += self._behind(i, self._lower(i))         # ClearNLP: verb > preposition > noun
            elif self.words[i].dep in ("obl", "agent", "dative") and (case := self.having(i, "case")):
                marks = sorted({*case, *(j for c in case for j in self.having(c, "fixed"))})
                nouns = self._texts(self._nouns([i]))            # UD: verb > noun > preposition
                found.append(self._phrase([self._lower(*marks), nouns]))
        return found

    def _behind(self, preposition: int, text: str) -> list[str]:
        found = [f"{text} {nouns}"] if (nouns := self._texts(self._nouns(self.having(preposition, "pobj")))) else []
        for i in self.having(preposition, "prep"):               # "out of"
            found += self._behind(i, f"{text} {self._lower(i)}")
        return found


class MotionParser:
    """A spaCy pipeline that reads motion out of English text.

    `name` is an installed pipeline ("en_core_web_sm"), the folder of one, or "embedded": the project's own small one, which knows the
    sentences of the synthetic world and nothing else.  A pipeline that is not there raises HawkError; none is ever put in its place.
    """

    def __init__(self, name: str = "en_core_web_sm"):
        self.name = name
        try:
            self.nlp = spacy.load(EMBEDDED if name == "embedded" else name, exclude=["ner", "lemmatizer"])
        # not there, damaged, without a package it needs, not a pipeline at all
        except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            raise HawkError(
                f"--spacy {name!r} is neither an installed spaCy pipeline nor the folder of one ({str(error).splitlines()[0][:80]}); "
                f"install its wheel with pip (python -m spacy download en_core_web_sm); for the synthetic world alone "
                f"there is --spacy embedded"
            ) from error
        has = set(self.nlp.pipe_names)
        if "parser" not in has or not ("morphologizer" in has or {"tagger", "attribute_ruler"} <= has):
            raise HawkError(f"--spacy {name!r} has {sorted(has)}; motion phrases need a parser and parts of speech (morphologizer, or "
                            f"tagger with attribute_ruler)")

    def describe(self) -> str:
        """Name and version for the provenance of a record."""
        meta = self.nlp.meta
        return f"{meta['lang']}_{meta['name']} {meta['version']} (spaCy {spacy.__version__})"

    def phrases(self, text: str) -> tuple[list[str], list[str]]:
        """(all, direct) phrases of a text, in the order of its verbs."""
        return self.phrases_many([text])[0]

    def phrases_many(self, texts: Iterable[str]) -> list[tuple[list[str], list[str]]]:
        """`phrases` of each text, parsed in batches; strings met on the way are forgotten afterwards."""
        with self.nlp.memory_zone():
            return [(parse.all(), parse.direct()) for parse in map(self._parse, self.nlp.pipe(texts, batch_size=256))]

    @staticmethod
    def _parse(doc) -> Parse:
        return Parse(Word(token.text, token.pos_, token.dep_, token.head.i) for token in doc)
