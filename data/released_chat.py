"""The chat template of the released demo, by the position of a message (hawk.md 6.1); the project itself generates from data/rows.py.

The released app asks first and adds the video afterwards, inside the answer handler: the video then stands where a reply belongs, and
replies are wrapped as if the user had spoken.  No model was trained on that; it is here to be told apart from the order that is right.
"""
from collections.abc import Iterable

from data import prompts
from data.text import IMAGE, Tokenizer

VIDEO = f"<Video>{IMAGE}</Video> "


def prompts_of(system: str, events: Iterable[tuple[str, str]]) -> list[str]:
    """The prompt at each answer.  events: ("upload", ""), ("ask", question), ("answer", what was answered)."""
    users, messages, found = [], [], []         # whether the user said it; what was said
    for event, text in events:
        if event == "answer":
            found.append(_prompt(system, messages))
        elif event == "ask" and users and users[-1] and "</Video>" in messages[-1]:
            messages[-1] = f"{messages[-1]} {text}"
            continue
        elif event not in ("ask", "upload"):
            raise ValueError(f"no such event: {event}")
        users.append(event != "answer")
        messages.append(VIDEO if event == "upload" else text)
    return found


def _prompt(system: str, messages: list[str]) -> str:
    """Even places are rounds of the user, odd ones replies, whoever said them."""
    text = ""
    for place, message in enumerate(messages):
        if place % 2 and message:
            text += f" {message} </s>"
        elif message:
            before = prompts.SYSTEM.format(system=system) if place == 0 else ""
            text += ("<s>" if place else "") + prompts.ROUND.format(message=before + message)
    return text


def segments(tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """Ids of the text between videos; BOS in front of the first piece only."""
    return [tokenizer.encode(part, bos=number == 0) for number, part in enumerate(prompt.split(IMAGE))]
