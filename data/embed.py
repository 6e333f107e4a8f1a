"""Makes the assets in data/embedded from the project's own sentences: `python -m data.embed [tokenizer] [spacy]`.

They serve the synthetic world only: a machine without a LLaMA-2 tokenizer or a spaCy model can still run the demo.
"""
import io
import string
import sys
from pathlib import Path

import sentencepiece

from data import prompts

FOLDER = Path(__file__).parent / "embedded"
VOCABULARY = 512                         # the demo's decoder has that many rows


def prompt_texts() -> list[str]:
    """Every text of data/prompts.py as the rows encode it, without line breaks (they are a piece of their own)."""
    templates = [prompts.PAPER_CAPTION, prompts.PAPER_QUESTION, prompts.RELEASED_QUESTION, prompts.SYSTEM]
    texts = [piece.format(question="", times="", system="").strip() for t in templates for piece in t.replace("{video}", "\n")
             .replace("{motion}", "\n").split("\n")]
    texts += [prompts.ROUND.format(message=question) for question in prompts.DESCRIPTION_QUESTIONS]
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """BPE with the conventions of LLaMA-2's model, except that what it cannot spell is unk: 256 byte pieces would be half the table."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCABULARY, model_type="bpe", character_coverage=1.0,
        byte_fallback=False, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, allow_whitespace_only_pieces=True, user_defined_symbols=["\n"],
        required_chars=string.ascii_letters + string.digits + ".,:;!?'\"()[]<>/-+*#%&@_=~", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2)
    path.write_bytes(model.getvalue())


def tokenizer_texts() -> list[str]:
    """Prompts and the synthetic world's sentences."""
    return prompt_texts() * 20 + [
        "A man in a red coat falls on the pavement near the station, which is abnormal because people usually walk there.",
        "What happens in the video?", "Who is involved?", "Nothing abnormal happens.", "A blue car drives along the road at night."] * 20


def main(parts: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    if not parts or "tokenizer" in parts:
        train_tokenizer(tokenizer_texts(), FOLDER / "tokenizer.model")


if __name__ == "__main__":
    main(sys.argv[1:])
