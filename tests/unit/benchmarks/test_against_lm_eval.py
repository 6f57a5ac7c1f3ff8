"""The comparison with lm-eval tells what the answers differ in from how they are read."""

from benchmarks.against_lm_eval import Answers, by_their_reading, compared

ADD = {
    "prompt": "def add(a, b):\n", "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}  # fmt: skip


def answers(*texts, whole=False):
    return Answers(texts, [False] * len(texts), whole)


def test_programs_are_read_in_both_ways():
    good, talk = (
        "    return a + b\n",
        "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```",
    )
    found = compared([ADD] * 3, answers(good, talk, good), answers(good, good, "    return 1\n"))
    assert found["same_text"] == 1
    assert (found["our_reading_of_ours"], found["their_reading_of_ours"]) == (3, 2)
    assert (found["our_reading_of_theirs"], found["their_reading_of_theirs"]) == (2, 2)
    assert found["read_differently"] == {"ours": [[1, "ours"]], "theirs": []}
    assert found["answered_differently"] == [2]


def test_a_whole_function_needs_no_prompt_in_front():
    body = "    return a + b\n"
    whole = answers(f"def add(a, b):\n{body}```\nand more", whole=True)
    assert by_their_reading([ADD], whole) == [True]
    assert by_their_reading([ADD], answers(body, whole=True)) == [False]


def test_numbers_are_read_as_the_task_does():
    rows = [{"question": "?", "answer": "so #### 1,200"}] * 4
    texts = answers("$1,200.", "It is 1200", "1200, or 5 cups", "none")
    assert by_their_reading(rows, texts) == [True, True, False, False]
