"""The kinds of queries that a model is asked to write about a text, and how it is asked.

The five kinds are those of the self-study recipe of "Cartridges" (Eyuboglu et al., 2025). Small
models follow examples rather than instructions, so each kind has one for both texts of EXAMPLES;
and they keep to the point if their first words are given.
"""

from __future__ import annotations

from dataclasses import dataclass

Messages = list[dict[str, str]]

# Texts about what a user's own is hardly ever about, and the words that give them away.
EXAMPLES = (
    "The lighthouse lends three telescopes, for four nights at most. A scratched lens costs 20 "
    "cents. Parrots wait outside.",
    "Water the ferns twice a week. The cactus needs water once a month, and a window to the south. "
    "Tell Mr. Oduya if a vase breaks.",
)
EXAMPLE_WORDS = "lighthouse telescope telescopes lens parrot parrots fern ferns cactus oduya vase"


@dataclass(kw_only=True, frozen=True)
class Kind:
    instructions: tuple[str, ...]
    """Several wordings; what they say is said after the text."""

    openings: tuple[str, ...]
    """First words of the query; none where the text is empty."""

    examples: tuple[str, str]
    """A query about each of EXAMPLES."""

    is_question: bool = False
    """Whether every such query asks something."""


KINDS = {
    "question": Kind(
        is_question=True,
        instructions=(
            "Write a question that somebody might ask about this text.",
            "Ask for one fact that this text tells.",
            "Write a short question whose answer is in this text.",
        ),
        openings=("What", "How", "When", "Can I", "Who", "How much", "Where", "Do", "Which", ""),
        examples=(
            "How much do I pay if I scratch the lens of a telescope?",
            "Who should hear of it when a vase breaks?",
        ),
    ),
    "summary": Kind(
        instructions=(
            "Write a request for a summary of a part of this text.",
            "Write what somebody says who wants one subject of this text summed up.",
        ),
        openings=(
            "Summarize",
            "Give me a short summary of",
            "Sum up",
            "What are the main points",
            "",
        ),
        examples=(
            "Summarize the rules for borrowing a telescope in two sentences.",
            "Give me a short summary of how the ferns and the cactus are watered.",
        ),
    ),
    "use_case": Kind(
        instructions=(
            "Write what a person whom this text can help might say: the situation, and a question.",
            "Describe the situation of somebody who needs this text, and what they ask.",
        ),
        openings=("I am", "I have", "My", "I want to", "I would like to", ""),
        examples=(
            "I am leaving in a week. Can I still take a telescope home for three nights?",
            "My room has a window to the north. Is it a good place for the cactus?",
        ),
    ),
    "structured": Kind(
        instructions=(
            "Write a request for a list, a table or JSON with facts of this text.",
            "Write a request to put some facts of this text in order, as a list, a table or JSON.",
        ),
        openings=("List", "Make a table of", "Write a JSON object with", "Give me a list of", ""),
        examples=(
            "List what can be borrowed at the lighthouse as a JSON object, with limits and fees.",
            "Make a table of the plants and how often each of them is watered.",
        ),
    ),
    "creative": Kind(
        instructions=(
            "Write a playful creative task about something in this text.",
            "Write a request for a poem, a story or a joke about something in this text.",
        ),
        openings=("Write a poem about", "Tell a story about", "Write a song about", "Invent", ""),
        examples=(
            "Write a short poem about a parrot that waits outside of the lighthouse.",
            "Tell the story of a cactus that is jealous of the ferns.",
        ),
    ),
}


def asking_for(kind: str, wording: int, text: str) -> Messages:
    """The conversation whose next message is a query about ``text``."""
    instruction = KINDS[kind].instructions[wording]
    messages: Messages = []
    for example, query in zip(EXAMPLES, KINDS[kind].examples, strict=True):
        messages += [_user(example, instruction), {"role": "assistant", "content": query}]
    return [*messages, _user(text, instruction)]


def _user(text: str, instruction: str) -> dict[str, str]:
    return {"role": "user", "content": f"{text.strip()}\n\n{instruction}"}
