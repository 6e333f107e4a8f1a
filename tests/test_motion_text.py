"""Motion phrases against the released code's golden, hand-built parses in both label sets, and sentences checked by hand."""
import json

import pytest

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
    for name in ("en_no_such_pipeline", str(tmp_path)):
        with pytest.raises(HawkError) as error:
            MotionParser(name)
        assert name in str(error.value) and "pip" in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_without_a_parser_is_refused(tmp_path):
    import spacy
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(HawkError, match="need a parser"):
        MotionParser(str(tmp_path / "blank"))
