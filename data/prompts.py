"""Every piece of prompt text that trained weights depend on.  A change here makes older checkpoints read other prompts.

Fields in braces are filled in by data/rows.py; `{video}` and `{motion}` stand for the visual tokens of a branch.  White space next to
visual tokens is dropped, and each piece of text between specials and visual tokens is encoded on its own (hawk.md 1.8).
Sources: "paper" = HAWK, section 4.1 and appendix D; "released" = the authors' code; "LLaMA-2" = the chat format of LLaMA-2.
"""

# LLaMA-2 chat format.  The spaces are part of it: `<s>[INST] question [/INST] answer </s>`; BOS and EOS are added as ids.
SYSTEM = "<<SYS>>\n{system}\n<</SYS>>\n\n"
ROUND = "[INST] {message} [/INST]"

# What follows the system block in the first message.
# paper: "Here is the input video embedding: <VIDEO_EMBEDDING> and motion embedding <MOTION_EMBEDDING> in different frames, please help
# me to <DESCRIBE_VIDEO> | <QUESTION>."  Questions end in their own mark, so the sentence's full stop is left out.
PAPER = "Here is the input video embedding: {video} and motion embedding {motion} in different frames, please help me to "
PAPER_QUESTION = PAPER + "{question}"
# released: one unmarked run of visual tokens, then the time message, then the question.
RELEASED_QUESTION = "<Video>{video}{motion}</Video> {times}{question}"
TIMES = "The video contains {count} frames sampled at {seconds} seconds. "

# Captions (stage 1) have no chat format.  paper: the same sentence; the paper does not say what fills its <DESCRIBE_VIDEO> for clips
# without an anomaly (WebVid), and a question about "the anomaly" would be false there, so a plain request does.
PAPER_CAPTION = PAPER + "describe the video."
# released: the prompt list of stage 1 is empty.
RELEASED_CAPTION = "{video}{motion}"

# Motion-language loss, both: the motion tokens, then the phrases.
MOTION = "{motion}"
PHRASE_SEPARATOR = ", "

# Released chat: the video is a message of its own that ends in a space, and the question is joined to it by another one.
RELEASED_CHAT = "<Video>{video}{motion}</Video>  {question}"
# The system prompt of the released demo (training uses a single space: input.system_prompt).
RELEASED_CHAT_SYSTEM = ("You are able to understand the visual content that the user provides. "
                        "Follow the instructions carefully and explain your answers in detail.")

# <DESCRIBE_VIDEO>, appendix D: one is drawn wherever a description replaces the first question-answer pair.
DESCRIPTION_QUESTIONS = (
    "Can you describe the anomaly in the video?",
    "How would you detail the anomaly found in the video?",
    "What anomaly can you identify in the video?",
    "Could you explain the anomaly observed in the video?",
    "Can you point out the anomaly in the video?",
    "What's the anomaly depicted in the video?",
    "Could you specify the anomaly present in the video?",
    "How do you perceive the anomaly in the video?",
    "Can you highlight the anomaly within the video?",
    "What anomaly is noticeable in the video?",
    "Could you characterize the anomaly seen in the video?",
    "Can you detail the specific anomaly encountered in the video?",
    "How would you describe the particular anomaly in the video?",
    "What details can you provide about the anomaly in the video?",
    "Could you elucidate on the anomaly detected in the video?",
    "Can you illustrate the nature of the anomaly in the video?",
    "What features of the anomaly in the video can you describe?",
    "Could you outline the anomaly observed in the video?",
    "How does the anomaly in the video manifest?",
    "Can you clarify the aspects of the anomaly in the video?",
)
