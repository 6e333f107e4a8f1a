"""Motion phrases against the released code's golden, hand-built parses in both label sets, and sentences checked by hand."""
import json
import pickle
import random

import pytest

from data import grammar, world_text
from data.motion_text import MotionParser, Parse, Word
from hawk_jax.config import HawkError


def parse(lines: str) -> Parse:
    """`text pos dep head` per word; the head by its index."""
    return Parse(Word(text, pos, dep, int(head)) for text, pos, dep, head in map(str.split, lines.strip().splitlines()))


def test_direct_phrases_equal_the_released_code(shared):
    golden = json.loads((shared / "goldens/hawk/motion_phrases.json").read_text())
    for case in golden["cases"]:
        words = [Word(t["text"], t["pos"], t["dep"], t["head"]) for t in case["tokens"]]
        assert ", ".join(Parse(words).direct()) == case["result"]


# The same three sentences as each annotation scheme draws them; what is expected was written down by reading the sentences.
PASSIVE_CLEARNLP = """
The DET det 1
car NOUN nsubjpass 3
was AUX auxpass 3
hit VERB ROOT 3
by ADP agent 3
a DET det 6
truck NOUN pobj 4
and CCONJ cc 3
spins VERB conj 3
out ADP prep 8
of ADP prep 9
the DET det 12
lane NOUN pobj 10
"""
PASSIVE_UD = """
The DET det 1
car NOUN nsubj:pass 3
was AUX aux:pass 3
hit VERB ROOT 3
by ADP case 6
a DET det 6
truck NOUN obl:agent 3
and CCONJ cc 8
spins VERB conj 3
out ADP case 12
of ADP fixed 9
the DET det 12
lane NOUN obl 8
"""
RELATIVE_CLEARNLP = """
Men NOUN nsubj 6
and CCONJ cc 0
boys NOUN conj 0
who PRON nsubj 4
run VERB relcl 0
today NOUN npadvmod 4
give VERB ROOT 6
her PRON dative 6
flowers NOUN dobj 6
"""
RELATIVE_UD = """
Men NOUN nsubj 6
and CCONJ cc 2
boys NOUN conj 0
who PRON nsubj 4
run VERB acl:relcl 0
today NOUN obl:unmarked 4
give VERB ROOT 6
her PRON iobj 6
flowers NOUN obj 6
"""
DATIVE_CLEARNLP = """
He PRON nsubj 1
throws VERB ROOT 1
bags NOUN dobj 1
to ADP dative 1
a DET det 5
man NOUN pobj 3
standing VERB acl 5
up ADP prt 6
near ADP prep 6
parked VERB amod 10
cars NOUN pobj 8
"""
DATIVE_UD = """
He PRON nsubj 1
throws VERB ROOT 1
bags NOUN obj 1
to ADP case 5
a DET det 5
man NOUN obl 1
standing VERB acl 5
up ADP compound:prt 6
near ADP case 10
parked VERB amod 10
cars NOUN obl 6
"""


CONTROL_CLEARNLP = """
Police NOUN nsubj 1
force VERB ROOT 1
drivers NOUN dobj 1
to PART aux 4
stop VERB xcomp 1
by ADP prep 4
waving VERB pcomp 5
flags NOUN dobj 6
"""
CONTROL_UD = """
Police NOUN nsubj 1
force VERB ROOT 1
drivers NOUN obj 1
to PART mark 4
stop VERB xcomp 1
by SCONJ mark 6
waving VERB advcl 4
flags NOUN obj 6
"""


@pytest.mark.parametrize("words, everything, direct", [
    (PASSIVE_CLEARNLP, ["car hit by truck", "car spins out of lane"], ["car hit", "spins"]),
    (PASSIVE_UD, ["car hit by truck", "car spins out of lane"], ["car hit", "spins"]),
    (RELATIVE_CLEARNLP, ["Men run", "Men and boys give her flowers"], ["who run", "Men give flowers"]),
    (RELATIVE_UD, ["Men run", "Men and boys give her flowers"], ["who run", "Men give flowers"]),
    (DATIVE_CLEARNLP, ["He throws bags to man", "man standing up near cars"], ["He throws bags", "standing", "parked"]),
    (DATIVE_UD, ["He throws bags to man", "man standing up near cars"], ["He throws bags", "standing", "parked"]),
    (CONTROL_CLEARNLP, ["Police force drivers", "drivers stop", "drivers waving flags"], ["Police force drivers", "stop", "waving flags"]),
    (CONTROL_UD, ["Police force drivers", "drivers stop", "drivers waving flags"], ["Police force drivers", "stop", "waving flags"]),
])
def test_both_label_sets_give_the_same_phrases(words, everything, direct):
    assert parse(words).all() == everything
    assert parse(words).direct() == direct


@pytest.fixture(scope="module")
def ud(shared) -> MotionParser:
    return MotionParser(str(shared / "data/spacy_en_ud"))


def test_a_real_pipeline_on_sentences_checked_by_hand(ud):
    text = "A man pushes the door and shouts at the guard."
    assert ud.phrases(text) == (["man pushes door", "man shouts at guard"], ["man pushes door", "shouts"])
    text = "The car was hit by a truck and spins out of the lane."
    assert ud.phrases(text) == (["car hit by truck", "car spins out of lane"], ["car hit", "spins"])
    assert ud.phrases("The driver makes the cyclist fall.")[0] == ["driver makes cyclist", "cyclist fall"]
    assert ud.phrases("Beautiful sunset over the sea") == ([], [])
    assert ud.phrases("") == ([], [])


def test_batches_equal_single_texts_and_name_their_pipeline(ud):
    texts = ["Dogs and cats chase birds and mice.", "", "A thief is seen climbing over the fence."]
    assert ud.phrases_many(texts) == [ud.phrases(text) for text in texts]
    assert ud.phrases_many(texts)[0] == (["Dogs and cats chase birds and mice"], ["Dogs chase birds"])
    assert ud.describe().startswith("en_ewt_captions_test 1.0.0 (spaCy 3.")


def test_a_missing_pipeline_is_one_line_and_never_replaced(tmp_path):
    for name in ("en_no_such_pipeline", str(tmp_path), "numpy", ""):
        with pytest.raises(HawkError) as error:
            MotionParser(name)
        assert name in str(error.value) and "pip" in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_without_a_parser_is_refused(tmp_path):
    import spacy
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(HawkError, match="need a parser"):
        MotionParser(str(tmp_path / "blank"))


# ------------------------------------------------------------------------------------------------ the embedded pipeline
EXPECTED = {   # of the first description of each class, read off the sentence by hand
    "walking": ["person walks along pavement at station"],
    "driving": ["car follows lane at station", "traffic flows"],
    "standing_up": ["man gets up from ground at station", "man continues way"],
    "empty": ["view stays", "nothing moves"],
    "wrong_way": ["vehicle drives against traffic at station", "vehicle risking crash"],
    "running": ["woman runs in panic at station", "woman fleeing from danger"],
    "falling": ["walker collapses", "walker remains", "walker lying at station", "he need doctor"],
    "pavement_cycling": ["cyclist rides bicycle between pedestrians at station", "cyclist using road"],
    "pavement_car": ["car left road", "car drives along sidewalk at station", "car threatens everyone"],
    "fire": ["Flames and smoke rise at station", "fire burns out of control"],
    "explosion": ["Something explodes in flash at station", "cloud spreads"],
    "collision": ["car hits pedestrian at station", "car knocks over victim"],
    "fight": ["people fight with fists at station", "police come"],
    "chase": ["pursuer chases victim at station", "pursuer catches up"],
    "abandoned_bag": ["traveller puts down", "traveller abandons bag", "nobody guards bag"],
    "loitering": ["stranger paces at station for reason"],
    "fence_climbing": ["intruder climbs over fence at station", "intruder enter area"],
    "jaywalking": ["Someone jaywalks across road at station", "Someone forces car", "car brake"],
}


@pytest.fixture(scope="module")
def embedded() -> MotionParser:
    return MotionParser("embedded")


def test_embedded_phrases_of_every_class(embedded):
    assert set(EXPECTED) == set(world_text.CLASSES)
    for name, phrases in EXPECTED.items():
        assert embedded.phrases(world_text.describe(name, ["red", "blue"], "station", True, 0, 0))[0] == phrases


def test_embedded_verbs_do_not_depend_on_colour_place_or_light(embedded):
    for name, words in world_text.CLASS_WORDS.items():
        for template in range(len(words.descriptions)):
            texts = [world_text.describe(name, colours, place, night, template, variant) for place in world_text.PLACES
                     for colours, night, variant in ((["red", "blue"], True, 0), (["white", "green"], False, 1))]
            assert len({tuple(direct) for _, direct in embedded.phrases_many(texts)}) == 1, texts[0]


def test_the_embedded_pipeline_names_itself_and_loads_without_pickle(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled something")
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    assert MotionParser("embedded").describe().startswith("en_hawk_world 1.0.0 (spaCy 3.")


def test_the_notation_of_the_grammar():
    text = "(nsubj (det a) man (cc and) (conj woman)) walks (advcl (mark because) (nsubj he/PRON) runs (cc and) (conj falls))"
    assert grammar.read(text) == [
        Word("a", "DET", "det", 1), Word("man", "NOUN", "nsubj", 4), Word("and", "CCONJ", "cc", 1), Word("woman", "NOUN", "conj", 1),
        Word("walks", "VERB", "ROOT", 4), Word("because", "SCONJ", "mark", 7), Word("he", "PRON", "nsubj", 7),
        Word("runs", "VERB", "advcl", 4), Word("and", "CCONJ", "cc", 7), Word("falls", "VERB", "conj", 7)]
    for broken in ("walks runs", "(nsubj (det a)) walks", "(nsubj man walks"):
        with pytest.raises(ValueError, match="head"):
            grammar.read(broken)


def test_every_sentence_of_the_grammar_is_a_projective_tree():
    rng = random.Random(1)
    for words in (grammar.sentence(rng) for _ in range(500)):
        assert sum(word.dep == "ROOT" for word in words) == 1
        for i, word in enumerate(words):
            low, high = sorted((i, word.head))
            assert all(low <= words[j].head <= high for j in range(low + 1, high))       # else the parser could not learn it
