"""Sentences about surveillance scenes whose parse is known by construction: what the embedded spaCy pipeline is trained on.

Notation: `(label ... head ...)` is a constituent; its one bare word is the head, nested constituents are its dependents, in order.
`<name>` stands for any entry of RULES[name].  Labels are ClearNLP's, as in en_core_web_sm; `word/POS` names a part of speech where
the label does not tell it (POS).
"""
import random
import re

from data.motion_text import Word

POS = {"det": "DET", "amod": "ADJ", "acomp": "ADJ", "advmod": "ADV", "aux": "AUX", "auxpass": "AUX", "cc": "CCONJ", "punct": "PUNCT",
       "prep": "ADP", "agent": "ADP", "prt": "ADP", "mark": "SCONJ", "nummod": "NUM", "poss": "PRON", "expl": "PRON", "ROOT": "VERB",
       "advcl": "VERB", "relcl": "VERB", "acl": "VERB", "xcomp": "VERB", "ccomp": "VERB", "pcomp": "VERB"}     # all others: NOUN

RULES = {
    "colour": "red yellow green blue purple white black grey orange brown".split(),
    "in": ["(prep in (pobj <colour>))"],
    "place": [
        "(prep on (pobj (det the) (amod main) street))", "(prep in (pobj front (prep of (pobj (det the) shops))))",
        "(prep in (pobj (det the) (compound parking) lot))", "(prep beside (pobj (det the) warehouse))",
        "(prep in (pobj (det the) (compound city) park))", "(prep near (pobj (det the) (amod old) trees))",
        "(prep at (pobj (det the) (compound train) station))", "(prep outside (pobj (det the) (compound subway) entrance))",
        "(prep near (pobj (det a) shop))", "(prep on (pobj (det the) corner))"],
    "when": ["(prep in (pobj daylight))", "(prep at (pobj night))"],
    "where": ["<place>", "<place> <when>", "<place>"],
    "cause": ["(prep for (pobj (det no) (amod clear) reason))", "(prep without (pobj warning))"],
    "front": ["<place> (punct ,)", "<cause> (punct ,)", "(prep after (pobj (det a) (amod short) rest)) (punct ,)",
              "(prep in (pobj (amod normal) traffic)) (punct ,)", "(prep against (pobj (det the) rules)) (punct ,)",
              "(prep in (pobj (det an) accident <when>)) (punct ,)", "<doing> (punct ,)", ""],
    "doing": ["(advcl ignoring (dobj (det the) arrow))", "(advcl fleeing (prep from (pobj (det some) danger)))",
              "(advcl risking (dobj (det a) (amod frontal) crash))", "(advcl carrying (dobj (det a) (amod <colour>) bag))",
              "(advcl (aux to/PART) enter (dobj (det a) (amod closed) area))"],
    "one": [*(f"(det a) {noun}" for noun in "person man woman walker cyclist stranger traveller pursuer pedestrian victim".split()),
            "(det an) intruder", "(det a) (amod frightened) woman", "somebody/PRON", "someone/PRON", "someone/PRON (amod careless)",
            "(det the) man", "(det the) walker", "(det the) victim"],
    "two": ["(nummod two) people", "(nummod two) (amod aggressive) people", "(det the) people"],
    "who": ["<one> <in>", "<one> <in>", "<one>"],
    "car": ["(det a) (amod <colour>) car", "(det a) (amod <colour>) vehicle", "(det a) (amod reckless) (amod <colour>) car",
            "(det the) car", "(det the) vehicle", "(det a) truck"],
    "victim": ["(det a) pedestrian <in>", "(det a) (amod fleeing/VERB) victim <in>", "(det the) victim",
               "(det a) (amod fleeing/VERB) victim", "(det a) pedestrian"],
    "way": ["(advmod calmly)", "(advmod away)", "(advmod away) (prep in (pobj panic))", "(advmod back (cc and) (conj forth))",
            "(advmod slowly)", "(advmod hard)", ""],
    "path": ["(prep along (pobj (det the) pavement))", "(prep along (pobj (det the) sidewalk))", "(prep across (pobj (det the) road))",
             "(prep against (pobj (det the) traffic))", "(prep over (pobj (det the) fence))", ""],
    "rest": ["(punct ,) <doing>", "(punct ,) (cc so) (conj <must>)", "(punct ,) (relcl (nsubj which/PRON) <threat>)", "(punct ,) <usual>",
             "<cause>", "(advcl (mark because) <clause>)", "(punct ,) (cc and) (conj <other>)", "(cc and) (conj <other>)", "", ""],
    "usual": ["(advcl (mark as) (nsubj people) (advmod usually) do/AUX)"],
    "threat": ["threatens (dobj everyone/PRON (prep on (pobj foot)))", "is/AUX (acomp abnormal)",
               "is/AUX (acomp abnormal) (advcl (mark because) (nsubj people) (advmod usually) walk (advmod there))"],
    "must": ["(nsubj he/PRON) (aux may) need (dobj (det a) doctor)", "(nsubj (det the) police) (aux must) come",
             "(nsubj <car>) (aux must) brake (advmod hard)"],
    "other": ["(nsubj (det the) traffic) flows (advmod well)", "(nsubj nothing/PRON) moves", "(nsubj (det a) (amod black) cloud) spreads",
              "(nsubj (amod grey) smoke) rises", "(nsubj (det the) (amod whole) view) stays (acomp quiet (cc and) (conj empty))"],
    "then": ["(conj (advmod then) (nsubj (det a) (amod black) cloud) spreads)", "(conj (advmod then) (nsubj he/PRON) stands)"],
    "moves": [*"walks runs drives climbs jaywalks paces falls stands moves rides".split()],
    # verbs with what follows them; subjects fit only roughly, which is the point: any subject may meet any verb
    "does": [
        "<moves> <way> <path>", "<moves> <path>", "(advmod angrily) <moves> <path>", "(advmod secretly) <moves> <path>",
        "walks (advmod calmly) (prep along (pobj (det the) pavement))", "runs (advmod away) (prep in (pobj panic))",
        "paces (advmod back (cc and) (conj forth))", "climbs (prep over (pobj (det the) fence))",
        "jaywalks (prep across (pobj (det the) road))", "drives (prep along (pobj (det the) sidewalk))",
        "drives (prep against (pobj (det the) traffic))", "follows (dobj (det the) lane) (advmod correctly)",
        "gets (prt up) (prep from (pobj (det the) ground))", "rides (dobj (det a) bicycle) (prep between (pobj pedestrians))",
        "hits (dobj <victim>)", "chases (dobj <victim>)", "(advmod angrily) chases (dobj <victim>)",
        "carries (dobj (det a) (amod <colour>) bag)"],
    "and": [
        "(cc and) (conj continues (dobj (poss his) way) (advmod unhurt/ADJ))", "(cc and) (conj knocks (dobj (det the) victim) (prt over))",
        "(cc and) (conj (advmod almost) catches (prt up))", "(cc and) (conj <moves> <path>)",
        "(cc and) (conj forces (dobj <car>) (xcomp (aux to/PART) brake (advmod hard)))",
        "(prep instead/ADV (prep of (pcomp using (dobj (det the) road))))"],
    "bag": ["(prt down) (cc and) (conj abandons (dobj (det a) (amod <colour>) bag <place>",
            "(prt down) (cc and) (conj abandons (dobj (det a) (amod <colour>) bag",
            "(prt down) (cc and) (conj abandons (dobj (det a) bag"],          # left open: <guard> may follow
    "guard": ["(punct ,) (relcl (dobj which/PRON) (nsubj nobody/PRON) guards)"],
    "fight": ["(nsubj <two> (prep in (pobj <colour> (cc and) (conj <colour>)))) fight (prep with (pobj (poss their) fists))",
              "(nsubj <two>) fight (prep with (pobj (poss their) fists))"],
    "blast": ["(nsubj something/PRON) explodes", "(nsubj something/PRON) (advmod suddenly) explodes",
              "(nsubj (det a) bomb) (advmod probably) explodes"],
    "fire": ["(nsubj (det a) fire) burns (prep out (prep of (pobj control)))",
             "(nsubj (det a) (amod dangerous) fire) burns (prep out (prep of (pobj control)))"],
    "still": ["stays (acomp quiet (cc and) (conj empty))"],
    # whole clauses, as they follow "because" or stand alone
    "clause": [
        "(nsubj <who>) <does>", "(nsubj <car>) <does>", "(nsubj <who>) collapses (cc and) (conj remains (xcomp lying))",
        "<fight>", "<fire>", "<blast> (prep in (pobj (det a) (amod bright) flash))", "(nsubj (det the) (amod whole) view) <still>",
        "(nsubj (det the) view) <still>",
        "(nsubj <who>) puts (prt down) (cc and) (conj abandons (dobj (det a) bag))", "(nsubj nobody/PRON) passes"],
}

SENTENCES = [
    "<front> (nsubj <who>) <does> <where> <rest>", "<front> (nsubj <car>) <does> <where> <rest>", "<front> (nsubj <who>) <does> <rest>",
    "<front> (nsubj <car>) <does> <rest>", "<front> (nsubj <who>) <does> <where>", "<front> (nsubj <car>) <does> <where>",
    "<front> (nsubj <who>) <does> <where> <and>", "<front> (nsubj <car>) <does> <where> <and>", "<front> (nsubj <who>) <does> <and>",
    "<front> (nsubj <car>) <does> <and>",
    "(nsubj <car>) (aux has) left (dobj (det the) road) "
    "(cc and) (conj drives <path> <where> (punct ,) (relcl (nsubj which/PRON) <threat>))",
    "<front> (nsubj <car>) (aux has) left (dobj (det the) road) (cc and) (conj drives (prep along (pobj (det the) sidewalk)))",
    "<front> (nsubj <who>) collapses (cc and) (conj remains (xcomp lying <where>)) (punct ,) (cc so) (conj <must>)",
    "<front> (nsubj <who>) collapses (cc and) (conj remains (xcomp lying <where>))",
    "<front> (nsubj <who>) collapses (cc and) (conj remains (xcomp lying)) (punct ,) (cc so) (conj <must>)",
    "<front> (nsubj <who>) puts <bag> <guard>))", "<front> (nsubj <who>) (advmod secretly) puts <bag>) <when>)",
    "<front> (nsubj <who>) puts <bag>))",
    "<front> <fight> <where>", "<front> <fight>", "<fight> <where> (punct ,) (cc so) (conj <must>)",
    "<front> <fire> <where> (punct ,) (cc and) (conj <other>)", "<front> <fire> <where>",
    "<front> (nsubj flames (cc and) (conj (amod grey) smoke)) rise <where> (advcl (mark because) <clause>)",
    "<front> (nsubj flames (cc and) (conj (amod grey) smoke)) rise (advcl (mark because) <fire>)",
    "<front> <blast> (prep in (pobj (det a) (amod bright) flash)) <where> (cc and) (conj <other>)",
    "<front> <blast> (prep in (pobj (det a) (amod bright) flash)) (cc and) (conj <other>)",
    "<blast> (prep in (pobj (det a) (amod bright) flash)) <where> (punct ,) <then>",
    "(nsubj (det the) (amod whole) view <place>) <still> (punct ,) (cc and) (conj <other>)",
    "<front> (nsubj (det the) (amod whole) view) <still> (punct ,) (cc and) (conj <other>)",
    "(nsubj nobody/PRON) passes <where> (punct ,) (cc and) (conj <other>)",
    # answers
    "<clause>", "<clause>", "(nsubj it/PRON) is/AUX (acomp abnormal) (advcl (mark because) <clause>)",
    "(nsubj nothing/PRON) is/AUX (acomp wrong) (advcl (mark because) <clause>)", "(nsubj it/PRON) happens <place>",
    "(nsubj it/PRON) happens <when>", "(expl there) is (attr (nummod one) person)", "(expl there) is (attr (nummod one) car)",
    "(expl there) are (attr (nummod two) people)", "(det a) person/NOUN <in>", "(det a) (amod <colour>) car/NOUN",
    "(det the) driver/NOUN (prep of (pobj <car>))", "(nsubj nothing/PRON) moves (advmod at/ADV (advmod all))",
    "(nsubj flames) grow (cc and) (conj (nsubj smoke) rises)", "(nsubj (det the) owner) leaves (prep without (pobj it/PRON))",
    "(nsubj (det the) car) (advmod never) brakes (prep in (pobj time))",
    # shapes that other wordings of the same scenes take
    "(nsubjpass <victim>) (auxpass is) hit (agent by (pobj <car>)) <where>", "(nsubjpass <who>) (auxpass is) seen <where>",
    "(nsubj <one> (acl wearing (dobj (det a) (amod <colour>) coat))) <does> <where>",
    "(nsubj <one> (relcl (nsubj who/PRON) carries (dobj (det a) bag))) <does> <where>",
    "(nsubj <one> <in> (cc and) (conj <one> <in>)) walk <path> <where>",
]


def expand(text: str, rng: random.Random) -> str:
    """`text` with every rule replaced by one of its entries, until none is left."""
    while (rule := re.search(r"<(\w+)>", text)):
        text = text[:rule.start()] + rng.choice(RULES[rule[1]]) + text[rule.end():]
    return text


def read(text: str) -> list[Word]:
    """The words of a sentence in the notation above, with heads and labels.  ValueError where a constituent has not one head."""
    labels, parents, heads, open_groups, words = ["ROOT"], [0], [None], [0], []
    for token in re.findall(r"\([\w]+|\)|[^\s()]+", text):
        if token == ")":
            open_groups.pop()
        elif token[0] == "(":
            labels.append(token[1:])
            parents.append(open_groups[-1])
            heads.append(None)
            open_groups.append(len(labels) - 1)
        else:
            group = open_groups[-1]
            if heads[group] is not None:
                raise ValueError(f"two heads in ({labels[group]} ...): {text}")
            heads[group] = len(words)
            words.append((*token.partition("/")[::2], group))
    if None in heads or open_groups != [0]:
        raise ValueError(f"a constituent without a head or an end: {text}")
    head = [heads[parents[group]] for _, _, group in words]
    pos = [given or POS.get(labels[group], "NOUN") for _, given, group in words]
    for i, (_, given, group) in enumerate(words):
        if labels[group] == "conj" and not given:
            pos[i] = pos[head[i]]        # heads of conjuncts stand before them
    return [Word(word, pos[i], labels[group], head[i]) for i, (word, _, group) in enumerate(words)]


def sentence(rng: random.Random) -> list[Word]:
    """A random sentence: capitalised (mostly), with a full stop (mostly)."""
    words = read(expand(rng.choice(SENTENCES), rng) + ("" if rng.random() < 0.1 else " (punct .)"))
    if rng.random() < 0.9:
        words[0] = words[0]._replace(text=words[0].text[0].upper() + words[0].text[1:])
    return words
