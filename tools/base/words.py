"""Words, wordings and scenes that the text corpus, the captions and the pictures of the tiny base share.

A scene is one shape: a color, a kind of shape, a size, a place and a background.  The wordings are our own; none of them is a
question sentence of easy-VQA (make_corpus.py checks that against the 107 sentences of the data set).
"""

import random
from dataclasses import dataclass

COLORS = ["red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "pink", "white"]
SHAPES = ["circle", "rectangle", "triangle", "star", "cross", "ring"]
SIZES = ["small", "medium", "big"]
COLUMNS = ["left", "middle", "right"]
ROWS = ["top", "center", "bottom"]
BACKGROUNDS = ["light", "dark", "striped", "grainy"]
BACKGROUND_WEIGHTS = [5, 1, 1, 1]


@dataclass
class Scene:
    color: str
    shape: str
    size: str
    row: str
    column: str
    background: str

    def place(self) -> str:
        return f"{self.row} {self.column}"


def random_scene(rng: random.Random) -> Scene:
    """The colors and shapes of the first two thirds of each list come twice as often as the rest."""
    color = rng.choice(COLORS[:8] * 2 + COLORS[8:])
    shape = rng.choice(SHAPES[:3] * 3 + SHAPES[3:])
    return Scene(color, shape, rng.choice(SIZES), rng.choice(ROWS), rng.choice(COLUMNS),
                 rng.choices(BACKGROUNDS, BACKGROUND_WEIGHTS)[0])


# ---- descriptions -------------------------------------------------------------------------------------------------------

SENTENCES = [
    "a {size} {color} {shape} in the {place} on a {background} background",
    "the picture shows a {color} {shape}.",
    "one {shape}, {color} and {size}, drawn in the {place}.",
    "this scene has a {background} background. in the {place} stands a {size} {shape}. its color is {color}.",
    "we look at a {shape}. it is {color}. it is {size}.",
    "the drawing holds a {color} figure. the figure is a {shape}. it sits in the {place}.",
    "color: {color}. shape: {shape}. size: {size}. place: {place}.",
    "a {color} {shape}",
    "a {shape} painted {color} on a {background} background",
    "{size} {shape}, {color}, {background} background",
]


def sentence(scene: Scene, rng: random.Random) -> str:
    return rng.choice(SENTENCES).format(place=scene.place(), **vars(scene))


def tags(scene: Scene, rng: random.Random) -> str:
    """A heap of keywords in any order, with repeats: what a very terse caption, or a picture cut into patches, is like."""
    bag = [scene.color] * rng.randint(1, 3) + [scene.shape] * rng.randint(1, 3)
    bag += rng.sample([scene.size, scene.row, scene.column], rng.randint(0, 3))
    bag += rng.choice([[], [scene.background]]) + [rng.choice(["background", "plain", "empty"])] * rng.choice([0, 0, 1, 2, 3, 5, 7])
    rng.shuffle(bag)
    return " ".join(bag)


def describe(scene: Scene, rng: random.Random) -> str:
    return tags(scene, rng) if rng.random() < 0.6 else sentence(scene, rng)


def caption(scene: Scene) -> str:
    """The caption of a picture: color and shape, nothing else, so that its few tokens teach what counts."""
    return article(f"{scene.color} {scene.shape}")


# ---- questions ----------------------------------------------------------------------------------------------------------
# {a} is what is asked for with its article ("a red shape", "a circle", "a red circle"), {b} without; {is} fits "is it ...?".

COLOR_QUESTIONS = [
    "what color does it have?", "which color do you see?", "name the color of the {noun}.", "what color has the {noun}?",
    "tell me the color of the {noun}.", "the {noun} has what color?", "in which color was the {noun} drawn?",
    "which color is the {noun}?", "what is its color?", "what color was the {noun} painted?", "what might be the color of the {noun}?",
]
SHAPE_QUESTIONS = [
    "which shape is it?", "what kind of shape do you see?", "name the shape.", "what shape does the {scene} show?",
    "tell me which shape the {scene} contains.", "the {scene} contains what shape?", "what shape is visible here?",
    "which shape is present here?", "what shape can be seen in the {scene}?", "what is drawn in the {scene}?",
    "what is the {color} thing?", "the {color} shape is called what?", "what do we call the {color} {thing}?",
    "which shape has been painted {color}?",
]
# (question, its negated form)
YES_NO = [
    ("do you see {a}?", "do you not see {a}?"),
    ("can {a} be seen?", "can {a} not be seen?"),
    ("is {a} visible?", "is {a} not visible?"),
    ("is {a} shown here?", "is no {b} shown here?"),
    ("is {a} drawn in the {scene}?", "is no {b} drawn in the {scene}?"),
    ("does the {scene} show {a}?", "does the {scene} not show {a}?"),
    ("does the {scene} have {a}?", "does the {scene} have no {b}?"),
    ("does this {scene} contain {a}?", "does this {scene} not contain {a}?"),
    ("does it contain {a}?", "does it contain no {b}?"),
    ("is there any {b} here?", "is there no {b} here?"),
    ("is there some {b} in this {scene}?", "is there not any {b} in this {scene}?"),
    ("are there {b}s?", "are there no {b}s?"),
    ("are there {b}s in the {scene}?", "are there not {b}s in the {scene}?"),
    ("is any {b} present?", "is not any {b} present?"),
    ("was {a} present here?", "was no {b} present here?"),
    ("has the {scene} {a}?", "has the {scene} no {b}?"),
    ("is {a} found in the {scene}?", "is {a} missing in the {scene}?"),
    ("is it true that {a} is present?", "is it true that no {b} is present?"),
    ("do we have {a} here?", "do we lack {a} here?"),
    ("is it {is}?", "is it not {is}?"),
    ("is the {thing} {is}?", "is the {thing} not {is}?"),
    ("would you call it {is}?", "would you not call it {is}?"),
    ("does the {scene} include {a}?", "is the {scene} without {a}?"),
]
SCENE_WORDS = ["picture", "image", "scene", "drawing", "text"]
THING_WORDS = ["shape", "thing", "figure", "object"]


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Asks for a color, a shape or both; half of the answers are yes, whatever the wording."""
    kind = rng.choice(["color", "color", "shape", "shape", "both"])
    hit = rng.random() < 0.5
    color, shape = scene.color, scene.shape
    other_color = rng.choice([c for c in COLORS if c != color])
    other_shape = rng.choice([s for s in SHAPES[:3] * 2 + SHAPES[3:] if s != shape])
    if kind == "color":
        word = color if hit else other_color
        noun, is_ = f"{word} {rng.choice(THING_WORDS + ['shape'] * 3)}", word
    elif kind == "shape":
        noun = shape if hit else other_shape
        is_ = article(noun)
    else:
        if not hit:
            color, shape = rng.choice([(other_color, shape), (color, other_shape), (other_color, other_shape)])
        noun = f"{color} {shape}"
        is_ = article(noun)
    negated = rng.random() < 0.3
    wording = rng.choice(YES_NO)[negated]
    question = wording.format_map({"a": article(noun), "b": noun, "is": is_, "scene": rng.choice(SCENE_WORDS), "thing": rng.choice(THING_WORDS)})
    return question.replace("crosss", "crosses"), "yes" if hit != negated else "no"


def short_question(scene: Scene, rng: random.Random, negated_share: float) -> tuple[str, str]:
    """The same in one to three words: what the language model learns first, since its few tokens carry many answers."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(["color?", "which color?"]), scene.color
    if kind < 0.2:
        return rng.choice(["shape?", "which shape?"]), scene.shape
    hit, negated = rng.random() < 0.5, rng.random() < negated_share
    right, pool = rng.choice([(scene.color, COLORS), (scene.shape, SHAPES)])
    word = right if hit else rng.choice([w for w in pool if w != right])
    return (rng.choice(["not", "no"]) + f" {word}?" if negated else f"{word}?"), "yes" if hit != negated else "no"


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer of one word."""
    kind = rng.random()
    noun = rng.choice([scene.shape, scene.shape, "shape", "thing", "figure"])
    slots = {"noun": noun, "scene": rng.choice(SCENE_WORDS), "color": scene.color, "thing": rng.choice(THING_WORDS)}
    if kind < 0.64:
        return yes_no(scene, rng)
    if kind < 0.81:
        return rng.choice(COLOR_QUESTIONS).format(**slots), scene.color
    return rng.choice(SHAPE_QUESTIONS).format(**slots), scene.shape
