"""Find the program in a completion by what parses, however it is wrapped.

A completion is one of three things, tried in this order:

1. The body of the prompt's function, as base models continue it.
2. A definition of the entry point, in a fence of any kind or without one.
3. A body in a fence, or indented in prose.

Of several definitions a complete one goes before one that is cut or empty. In fences the last one
counts, as the answer a chat model ends with; without fences the first one, as base models run on.
Of the rest of the answer only what the definition needs is kept: imports, helpers, constants.
Code that ends in the middle is taken up to the last line that parses. Nothing is renamed, and only
indentation and typography are repaired. Where no code is found the program says so and fails.

The time is bounded: `parser` reads a fixed number of characters of an answer, whatever it holds.
"""

from student_trainer.evaluation.extract.program import extract_code
from student_trainer.evaluation.extract.text import after_thoughts

__all__ = ["after_thoughts", "extract_code"]
