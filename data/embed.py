"""Makes the assets in data/embedded from the project's own sentences: `python -m data.embed [tokenizer] [spacy]`.

They serve the synthetic world only: a machine without a LLaMA-2 tokenizer or a spaCy model can still run the demo.
"""
import io
import random
import re
import string
import sys
import tempfile
from collections import Counter
from pathlib import Path

import sentencepiece
import spacy
from sentencepiece import sentencepiece_model_pb2
from spacy.tokens import Doc
from spacy.training import Example

from data import grammar, prompts
from data.motion_text import Word
from data.text import Tokenizer
from data.world_text import all_texts

FOLDER = Path(__file__).parent / "embedded"
VOCABULARY = 512                         # rows of the demo's decoder; the model may have fewer pieces
PROMPT_WEIGHT = 20                       # a prompt is in every row, a sentence of the world in few
MARKS = ("\u2581[INST]", "\u2581[/INST]", "<<SYS>>", "<</SYS>>", "<Video>", "\u2581</Video>", "Here")    # glued to what stands before


# ------------------------------------------------------------------------------------------------ pieces
def prompt_texts() -> list[str]:
    """Every text of data/prompts.py as the rows encode it, without line breaks (they are a piece of their own)."""
    templates = [prompts.PAPER_CAPTION, prompts.PAPER_QUESTION, prompts.RELEASED_QUESTION, prompts.SYSTEM, prompts.TIMES]
    texts = [text.format(question="", times="", system="", count="", seconds="").strip()
             for template in templates for text in re.split(r"\{video\}|\{motion\}|\n", template)]
    texts += [prompts.ROUND.format(message=question) for question in prompts.DESCRIPTION_QUESTIONS]
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A sentencepiece model with LLaMA-2's conventions, in which nearly every word of `texts` is one piece.

    Not LLaMA-2's BPE: with 512 pieces BPE spends a third of them on parts of words (1.35 pieces a word against 1.1).  What it cannot
    spell is unk, as 256 byte pieces would be half the table; printable ASCII and line breaks it can.
    """
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    seeds = {f"\u2581{word}": count for word, count in words.items()} | dict.fromkeys(MARKS, PROMPT_WEIGHT)
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.write("".join(f"{piece}\t{count}\n" for piece, count in sorted(seeds.items(), key=lambda item: (-item[1], item[0]))))
        file.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram", vocab_size=VOCABULARY, hard_vocab_limit=False,
            seed_sentencepieces_file=file.name, character_coverage=1.0, required_chars=string.printable[:94], byte_fallback=False,
            user_defined_symbols=["\n"], split_digits=True, split_by_unicode_script=False, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")    # the name of a temporary file: without it every run gives the same bytes
    path.write_bytes(proto.SerializeToString(deterministic=True))


def make_tokenizer() -> str:
    texts = prompt_texts() * PROMPT_WEIGHT + all_texts()
    train_tokenizer(texts, FOLDER / "tokenizer.model")
    tokenizer = Tokenizer("embedded")
    units = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in all_texts())
    pieces = sum(len(tokenizer.plain(text)) for text in all_texts())
    return f"tokenizer.model: {tokenizer.size} pieces, {pieces / units:.2f} a word or mark of the world, digest {tokenizer.digest}"


# ------------------------------------------------------------------------------------------------ parser
PIPELINE = {
    "nlp": {"lang": "en", "pipeline": ["tok2vec", "morphologizer", "parser"], "batch_size": 256},
    "components": {
        "tok2vec": {"factory": "tok2vec", "model": {
            "@architectures": "spacy.HashEmbedCNN.v2", "width": 48, "depth": 3, "embed_size": 400, "window_size": 1, "maxout_pieces": 2,
            "subword_features": True, "pretrained_vectors": None}},
        "morphologizer": {"factory": "morphologizer", "model": {
            "@architectures": "spacy.Tagger.v2", "tok2vec": {"@architectures": "spacy.Tok2VecListener.v1", "width": 48}}},
        "parser": {"factory": "parser", "model": {
            "@architectures": "spacy.TransitionBasedParser.v2", "state_type": "parser", "extra_state_tokens": False, "hidden_width": 48,
            "maxout_pieces": 2, "use_upper": False, "tok2vec": {"@architectures": "spacy.Tok2VecListener.v1", "width": 48}}}},
}
SENTENCES, PASSES, BATCH = 3000, 8, 48   # distinct random sentences, passes over them, sentences per update


def _example(nlp, words: list[Word]) -> Example:
    texts = [word.text for word in words]
    spaces = [after not in ",." for after in texts[1:]] + [False]
    known = Doc(nlp.vocab, texts, spaces, pos=[w.pos for w in words], heads=[w.head for w in words], deps=[w.dep for w in words])
    return Example(nlp.make_doc(known.text), known)


def make_pipeline() -> str:
    """Trains tagger and parser on random sentences of data/grammar.py; returns what it scores on 500 others."""
    spacy.util.fix_random_seed(0)
    nlp = spacy.util.load_model_from_config(PIPELINE, auto_fill=True)
    nlp.meta.update(name="hawk_world", version="1.0.0", license="Apache-2.0",
                    description="Sentences of the synthetic surveillance world and nothing else; made by `python -m data.embed`")
    rng = random.Random(0)
    examples = [_example(nlp, grammar.sentence(rng)) for _ in range(SENTENCES)]
    held_out = [_example(nlp, grammar.sentence(rng)) for _ in range(500)]
    optimizer = nlp.initialize(lambda: examples)
    for done in range(PASSES):
        optimizer.learn_rate = 0.003 * (1 - done / PASSES)
        rng.shuffle(examples)
        for first in range(0, SENTENCES, BATCH):
            nlp.update(examples[first:first + BATCH], sgd=optimizer, drop=0.1)
    scores = nlp.evaluate(held_out)
    nlp.to_disk(FOLDER / "spacy")
    return "spacy: " + ", ".join(f"{key} {scores[key]:.3f}" for key in ("pos_acc", "dep_uas", "dep_las")) + " on sentences not trained on"


# ------------------------------------------------------------------------------------------------ command
def main(parts: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    if not parts or "tokenizer" in parts:
        print(make_tokenizer())
    if not parts or "spacy" in parts:
        print(make_pipeline())


if __name__ == "__main__":
    main(sys.argv[1:])
