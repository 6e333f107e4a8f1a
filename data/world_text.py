"""The language of the synthetic world: what a scene is called, how it is described, asked about and answered.

Each description and each "what" or "why" answer holds exactly one class phrase, so that a generated text can be scored by the class it
names (`class_named`).  The wording of one class is kept apart from that of the others: a text about the wrong clip then shares few
word sequences with the right one, and BLEU tells a model that looks from one that only speaks.
"""
import functools
import itertools
from dataclasses import dataclass

COLOURS = {"red": (225, 30, 30), "yellow": (250, 225, 30), "green": (30, 190, 60), "blue": (35, 75, 245), "purple": (185, 45, 215),
           "white": (250, 250, 250)}      # RGB; far apart at 56 pixels, none near the orange of fire

PLACES = {"street": ("on the main street", "in front of the shops"),
          "parking": ("in the parking lot", "beside the warehouse"),
          "park": ("in the city park", "near the old trees"),
          "station": ("at the train station", "outside the subway entrance")}

WHEN = {False: "in daylight", True: "at night"}


@dataclass(frozen=True)
class Words:
    """What one class is called.  Slots: {p} place, {P} capitalised, {w} day or night, {c1} {c2} colours of the first and second actor."""
    phrase: str                         # occurs in every description and every "what" and "why" answer of the class, in no other class
    descriptions: tuple[str, ...]
    who: str
    what: str                           # the class phrase with its subject, lower case, no full stop
    how: str
    count: str                          # answer to "how many"


CLASS_WORDS = {
    "walking": Words(
        "walks calmly along the pavement",
        ("A person in {c1} walks calmly along the pavement {p}, as people usually do.",
         "{P}, a person in {c1} walks calmly along the pavement, as people usually do.",
         "A person in {c1} walks calmly along the pavement {p} {w}."),
        "A person in {c1}.", "the person walks calmly along the pavement", "Slowly and step by step.", "There is one person."),
    "driving": Words(
        "follows the lane correctly",
        ("A {c1} car follows the lane correctly {p}, and the traffic flows well.",
         "{P}, a {c1} car follows the lane correctly, and the traffic flows well.",
         "In normal traffic, a {c1} car follows the lane correctly {p} {w}."),
        "The driver of a {c1} car.", "the car follows the lane correctly", "At a steady and legal speed.", "There is one car."),
    "standing_up": Words(
        "gets up from the ground",
        ("A man in {c1} gets up from the ground {p} and continues his way unhurt.",
         "{P}, a man in {c1} gets up from the ground and continues his way unhurt.",
         "After a short rest, a man in {c1} gets up from the ground {p} {w}."),
        "A man in {c1}.", "the man gets up from the ground", "First he lies, then he stands.", "There is one man."),
    "empty": Words(
        "stays quiet and empty",
        ("The whole view {p} stays quiet and empty, and nothing moves.",
         "{P}, the whole view stays quiet and empty, and nothing moves.",
         "Nobody passes {p} {w}, and the whole view stays quiet and empty."),
        "Nobody is there.", "the view stays quiet and empty", "Nothing moves at all.", "There is nobody."),
    "wrong_way": Words(
        "drives against the traffic",
        ("A {c1} vehicle drives against the traffic {p}, risking a frontal crash.",
         "{P}, a {c1} vehicle drives against the traffic, risking a frontal crash.",
         "Ignoring the arrow, a {c1} vehicle drives against the traffic {p} {w}."),
        "The driver of a {c1} vehicle.", "the vehicle drives against the traffic", "In the forbidden direction.", "There is one vehicle."),
    "running": Words(
        "runs away in panic",
        ("A frightened woman in {c1} runs away in panic {p}, fleeing from some danger.",
         "{P}, a frightened woman in {c1} runs away in panic, fleeing from some danger.",
         "Fleeing from some danger, a woman in {c1} runs away in panic {p} {w}."),
        "A frightened woman in {c1}.", "the woman runs away in panic", "Very fast and without looking back.", "There is one woman."),
    "falling": Words(
        "collapses and remains lying",
        ("A walker in {c1} collapses and remains lying {p}, so he may need a doctor.",
         "{P}, a walker in {c1} collapses and remains lying, so he may need a doctor.",
         "Without warning, a walker in {c1} collapses and remains lying {p} {w}."),
        "A walker in {c1}.", "the walker collapses and remains lying", "First he stands, then he lies.", "There is one walker."),
    "pavement_cycling": Words(
        "rides a bicycle between pedestrians",
        ("A cyclist in {c1} rides a bicycle between pedestrians {p} instead of using the road.",
         "{P}, a cyclist in {c1} rides a bicycle between pedestrians instead of using the road.",
         "Against the rules, a cyclist in {c1} rides a bicycle between pedestrians {p} {w}."),
        "A cyclist in {c1}.", "the cyclist rides a bicycle between pedestrians", "On two wheels, where people walk.",
        "There is one cyclist."),
    "pavement_car": Words(
        "drives along the sidewalk",
        ("A {c1} car has left the road and drives along the sidewalk {p}, which threatens everyone on foot.",
         "{P}, a {c1} car has left the road and drives along the sidewalk.",
         "A reckless {c1} car drives along the sidewalk {p} {w}, which threatens everyone on foot."),
        "A reckless driver in a {c1} car.", "the car drives along the sidewalk", "On four wheels, beside the road.", "There is one car."),
    "fire": Words(
        "fire burns out of control",
        ("Flames and grey smoke rise {p} because a fire burns out of control.",
         "{P}, flames and grey smoke rise because a fire burns out of control.",
         "A dangerous fire burns out of control {p} {w}, and grey smoke rises."),
        "Nobody, only flames.", "a fire burns out of control", "Flames grow and smoke rises.", "There is one burning spot."),
    "explosion": Words(
        "explodes in a bright flash",
        ("Something explodes in a bright flash {p} and a black cloud spreads.",
         "{P}, something suddenly explodes in a bright flash and a black cloud spreads.",
         "A bomb probably explodes in a bright flash {p} {w}, then a black cloud spreads."),
        "Nobody, only a blast.", "something explodes in a bright flash", "Suddenly, with a black cloud.", "There is one blast."),
    "collision": Words(
        "hits a pedestrian",
        ("A {c1} car hits a pedestrian in {c2} {p} and knocks the victim over.",
         "{P}, a {c1} car hits a pedestrian in {c2} and knocks the victim over.",
         "In an accident {w}, a {c1} car hits a pedestrian in {c2} {p}."),
        "A {c1} car and its victim in {c2}.", "the car hits a pedestrian", "The car never brakes in time.",
        "There is one car and one victim."),
    "fight": Words(
        "fight with their fists",
        ("Two people in {c1} and {c2} fight with their fists {p}, so the police must come.",
         "{P}, two people in {c1} and {c2} fight with their fists.",
         "Two aggressive people in {c1} and {c2} fight with their fists {p} {w}."),
        "Two people in {c1} and {c2}.", "two people fight with their fists", "Violently and at close distance.", "There are two people."),
    "chase": Words(
        "chases a fleeing victim",
        ("A pursuer in {c1} chases a fleeing victim in {c2} {p} and almost catches up.",
         "{P}, a pursuer in {c1} chases a fleeing victim in {c2} and almost catches up.",
         "Somebody in {c1} angrily chases a fleeing victim in {c2} {p} {w}."),
        "A pursuer in {c1} and a runner in {c2}.", "the pursuer chases a fleeing victim", "One closely behind the other.",
        "There are two runners."),
    "abandoned_bag": Words(
        "puts down and abandons",
        ("A traveller in {c1} puts down and abandons a {c2} bag {p}, which nobody guards.",
         "{P}, a traveller in {c1} puts down and abandons a {c2} bag, which nobody guards.",
         "A traveller in {c1} secretly puts down and abandons a {c2} bag {p} {w}."),
        "A traveller in {c1} with a {c2} bag.", "the traveller puts down and abandons a bag", "The owner leaves without it.",
        "There is one traveller and one bag."),
    "loitering": Words(
        "paces back and forth",
        ("A stranger in {c1} paces back and forth {p} for no clear reason.",
         "{P}, a stranger in {c1} paces back and forth for no clear reason.",
         "For no clear reason, a stranger in {c1} paces back and forth {p} {w}."),
        "A stranger in {c1}.", "the stranger paces back and forth", "Turning around again and again.", "There is one stranger."),
    "fence_climbing": Words(
        "climbs over the fence",
        ("An intruder in {c1} climbs over the fence {p} to enter a closed area.",
         "{P}, an intruder in {c1} climbs over the fence to enter a closed area.",
         "To enter a closed area, an intruder in {c1} climbs over the fence {p} {w}."),
        "An intruder in {c1}.", "the intruder climbs over the fence", "Up the bars and down behind them.", "There is one intruder."),
    "jaywalking": Words(
        "jaywalks across the road",
        ("Someone in {c1} jaywalks across the road {p} and forces a {c2} car to brake hard.",
         "{P}, someone in {c1} jaywalks across the road and forces a {c2} car to brake hard.",
         "Someone careless in {c1} jaywalks across the road {p} {w}, so a {c2} car must brake hard."),
        "Someone in {c1} and a {c2} car.", "someone jaywalks across the road", "The car brakes and nobody is touched.",
        "There is one car and one careless walker."),
}
CLASSES = tuple(CLASS_WORDS)
NORMAL = ("walking", "driving", "standing_up", "empty")
CLASS_PHRASES = {name: (words.phrase,) for name, words in CLASS_WORDS.items()}

QUESTIONS = {
    "what": ("What happens in this video?", "What can be seen here?"),
    "who": ("Who is involved?", "Who can be seen in the video?"),
    "where": ("Where does it happen?", "At which place was this recorded?"),
    "when": ("When does it happen?", "At what time of day was this recorded?"),
    "why": ("Why is this scene normal or abnormal?", "Is something wrong here, and why?"),
    "how": ("How does it happen?", "In which way does it happen?"),
    "how many": ("How many people or things are involved?", "How many of them can be seen?"),
}


def _fill(template: str, colours, place_phrase: str, night: bool) -> str:
    return template.format(p=place_phrase, P=place_phrase[0].upper() + place_phrase[1:], w=WHEN[night], c1=colours[0], c2=colours[1])


def describe(name: str, colours, place: str, night: bool, template: int, variant: int) -> str:
    """One description: `template` numbers the sentences of the class, `variant` the phrases of the place."""
    return _fill(CLASS_WORDS[name].descriptions[template], colours, PLACES[place][variant], night)


def references(row: dict) -> list[str]:
    """All descriptions that are right for a row of labels.jsonl: every sentence of its class, every phrase of its place."""
    templates, variants = CLASS_WORDS[row["class"]].descriptions, PLACES[row["place"]]
    return [describe(row["class"], row["colours"], row["place"], row["night"], t, v)
            for t, v in itertools.product(range(len(templates)), range(len(variants)))]


def answer(kind: str, row: dict, variant: int = 0) -> str:
    """The answer to a question of `kind` about a row of labels.jsonl."""
    words, place = CLASS_WORDS[row["class"]], PLACES[row["place"]][variant]
    verdict = "It is abnormal because " if row["abnormal"] else "Nothing is wrong because "
    template = {"what": words.what[0].upper() + words.what[1:] + ".", "who": words.who, "where": "It happens {p}.",
                "when": "It happens {w}.", "why": verdict + words.what + ".", "how": words.how, "how many": words.count}[kind]
    return _fill(template, row["colours"], place, row["night"])


@functools.cache
def _phrases() -> tuple[tuple[str, str], ...]:
    return tuple((phrase, name) for name, phrases in CLASS_PHRASES.items() for phrase in phrases)


def class_named(text: str) -> str | None:
    """The class whose phrase the text holds; None if it names no class, or more than one."""
    text = " ".join(text.lower().split())
    found = {name for phrase, name in _phrases() if phrase in text}
    return found.pop() if len(found) == 1 else None


def all_texts() -> list[str]:
    """Every sentence the world can say: for training and testing pieces and parser.  Sorted, without repeats."""
    texts = {question for questions in QUESTIONS.values() for question in questions}
    second = dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))]))     # each colour once in each slot is enough
    for name, place, night, colour in itertools.product(CLASSES, PLACES, WHEN, COLOURS):
        row = {"class": name, "place": place, "night": night, "colours": [colour, second[colour]], "abnormal": name not in NORMAL}
        texts.update(references(row))
        texts.update(answer(kind, row, variant) for kind in QUESTIONS for variant in range(2))
    return sorted(texts)
