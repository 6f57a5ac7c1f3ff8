"""The forms in which models give one and the same code, by name."""

import html
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A problem with a body that goes behind its prompt."""

    prompt: str
    name: str
    body: str

    @property
    def whole(self) -> str:
        """Imports, helpers and the function, as a chat model repeats them."""
        return self.prompt + self.body.rstrip("\n") + "\n"

    @property
    def function(self) -> str:
        """The function alone."""
        return self.whole[self.whole.index(f"def {self.name}") :]

    @property
    def lines(self) -> list[str]:
        return self.body.rstrip("\n").split("\n")


def indented(text: str, space: str) -> str:
    return textwrap.indent(text, space, lambda line: line != "\n")


def bodies(task: Task) -> dict[str, str]:
    """Answers that continue the prompt."""
    body, name, whole = task.body.rstrip("\n") + "\n", task.name, task.whole
    loose = textwrap.dedent(body)
    return {
        "body": body,
        "body without a last newline": body.rstrip("\n"),
        "body after an empty line": "\n" + body,
        "body, first indentation lost": body.lstrip(" "),
        "body, first line one space": " " + body.lstrip(" "),
        "body, first line in excess": "        " + body.lstrip(" "),
        "body, indentation lost": loose,
        "body, all in excess": indented(body, "    "),
        "body, all one more space": indented(body, " "),
        "body in tabs": indented(loose.replace("    ", "\t"), "\t"),
        "body with CRLF": body.replace("\n", "\r\n"),
        "body and a comment": body + "\n# Test the function\n",
        "body and a test function": body + f"\n\ndef test_{name}():\n    assert {name}() == 1\n",
        "body and calls": body + f"\nprint({name}(undefined))\n",
        "body and a main block": body
        + f'\nif __name__ == "__main__":\n    print({name}(input()))\n',
        "body and the same def": body + "\n\n" + task.function,
        "body and the same def, cut": body + "\n\n" + f"def {name}(*arguments:\n",
        "body and a stub of it": body + f"\n\ndef {name}(*arguments):\n    pass\n",
        "body and a closing fence": body + "```\n",
        "body, closing fence, prose": body + "```\n\nThis function isn't hard: it works.\n",
        "body, closing fence, usage fence": body
        + f"```\n\nExample:\n\n```python\nprint({name}(1))\n```\n",
        "body, closing fence, prose, the whole": body + f"```\n\nIn full:\n```python\n{whole}```\n",
        "body and glued fence": body.rstrip("\n") + "```\nThat's all.",
        "body and prose": body + "\nThe function above doesn't need much memory.\n",
        "body and doctest lines": body + f"\n>>> {name}(1)\n2\n",
        "body and an end token": body + "<|im_end|>\nuser\nThanks",
        "body after its docstring": f'    """It is as told above."""\n{body}',
        "body after a comment": f"    # Let's do it.\n{body}",
        "body in a fence": f"```python\n{body}```",
        "body in a fence, indentation lost": f"Here:\n```python\n{loose}```\nDone.",
        "body in a fence, first line lost": f"```\n{body.lstrip(' ')}```",
        "body indented in prose": f"The missing lines are:\n\n{body}\nThey aren't long.\n",
        "body and class of tests": body
        + "\n\nimport unittest\nclass T(unittest.TestCase):\n    pass\nunittest.main()\n",
    }


def definitions(task: Task) -> dict[str, str]:
    """Answers that hold the whole function."""
    name, whole, function = task.name, task.whole, task.function
    quoted = "".join(f"> {line}\n" for line in whole.split("\n"))
    session = ">>> " + function.rstrip("\n").replace("\n", "\n... ")
    usage = f"```python\nfrom solution import {name}\nprint({name}(1))\n```"
    stub = f"```python\ndef {name}(*arguments):\n    pass\n```"
    wrong = f"```python\ndef {name}(*arguments):\n    return 'nonsense'\n```"
    fence = f"```python\n{whole}```"
    return {
        "whole": whole,
        "function alone": function,
        "whole after prose": f"Here's the function:\n\n{whole}",
        "whole between prose": f"Sure, it's easy.\n\n{whole}\nIt doesn't need more.\nNote: fine\n",
        "whole, prose glued": f"Here's the function:\n{function}This function doesn't fail.\n",
        "whole and calls": f"{whole}\nprint({name}(undefined))\nx = int(input())\n",
        "whole and a main block": f"{whole}\nif __name__ == '__main__':\n    {name}(input())\n",
        "whole and a test function": f"{whole}\n# Test\ndef test():\n    assert {name}() == 1\ntest()\n",  # noqa: E501
        "whole and doctest lines": f"{whole}\n>>> {name}(1)\n2\n",
        "whole, indented": indented(whole, "    "),
        "whole and a closing fence": whole + "```\nIt's right.\n",
        "fence": fence,
        "fence without a tag": f"```\n{whole}```",
        "fence Python": f"```Python\n{whole}```",
        "fence python3": f"```python3\n{whole}```\n",
        "fence py": f"Code:\n```py\n{function}```\nThat's it.",
        "fence PYTHON, spaces": f"```  PYTHON  \n{whole}```  \n",
        "fence with attributes": f'```python title="a.py"\n{whole}```',
        "fence with braces": f"```{{.python .numberLines}}\n{whole}```",
        "tildes": f"~~~python\n{whole}~~~\n",
        "four backticks": f"````python\n{whole}````",
        "four backticks, fences in the docstring": "````python\n"
        + whole.replace('"""', '"""\n    ```\n    x\n    ```\n', 1)
        + "````",
        "fence with CRLF": fence.replace("\n", "\r\n"),
        "fence in a list": f"1. Write it:\n\n{indented(fence, '   ')}\n\n2. Run it.\n",
        "fence on a list's line": "- " + indented(fence, "  ").lstrip() + "\n- Don't worry.\n",
        "fence in a quote": f"> It's this:\n>\n> ```python\n{quoted}> ```\n",
        "fence not closed": f"It's this:\n```python\n{whole}",
        "fence glued to prose": f"Here's the code: ```python\n{whole}```",
        "closing fence glued": f"```python\n{whole.rstrip()}```",
        "indented as Markdown code": f"It's this:\n\n{indented(whole, '    ')}\nDone.\n",
        "shell fence first": f"```bash\npip install numpy\n```\n\n{fence}",
        "usage fence first": f"{usage}\n\n{fence}",
        "output fence first": f"```\n[1, 2, 3]\n```\n{fence}",
        "usage fence after": f"{fence}\n\nUse it:\n{usage}\n\nOutput:\n```\n3\n```\n",
        "test fence after": f"{fence}\n```python\nimport pytest\ndef test():\n"
        f"    assert {name}() == 3\n```",
        "stub first": f"You gave me:\n{stub}\nIt's solved so:\n{fence}",
        "wrong draft first": f"A first try:\n{wrong}\nThat isn't right. Corrected:\n{fence}",
        "cut copy after": f"{fence}\nOnce more:\n```python\ndef {name}(*arguments):\n    return (1,",  # noqa: E501
        "calls in the fence": f"```python\n{whole}\nprint({name}(undefined))\nn = int(input())\n```",  # noqa: E501
        "main block in the fence": f"```python\n{whole}\nif __name__ == '__main__':\n"
        f"    {name}(input())\n```",
        "tests in the fence": f"```python\nimport pytest\n{whole}\ndef test():\n    assert 0\ntest()\n```",  # noqa: E501
        "prose in the fence": f"```python\n{whole}\nThis function isn't slow.\n```",
        "helper in a fence of its own": "```python\nlimit = 3\ndef helper(value):\n"
        f"    return value\n```\nand then\n```python\n{_wrapped(function, name)}```\n",
        "helper after it": f"```python\n{_wrapped(function, name)}\n"
        "limit = 3\ndef helper(value):\n    return value\n```",
        "think": f"<think>\nIt's easy.\n{wrong}\n</think>\n\n{fence}",
        "think around a right draft": f"<think>\n{fence}\nBut isn't it slow?\n</think>\n{fence}",
        "think not closed": f"<think>\nWell, it's easy.\n\n{fence}",
        "think not opened": f"It's easy.\n{wrong}\n</think>\n{fence}",
        "think, then body": f"<think>\nLet's go.\n{wrong}\n</think>\n{task.body}",
        "THINK in brackets": f"[THINK]It's easy.\n{wrong}[/THINK]{fence}",
        "gpt-oss channels": f"analysisWe need it.\n{wrong}\nassistantfinal{fence}",
        "session": f"```\n{session}\n>>> {name}(1)\n2\n```",
        "session without a fence": f"{session}\n",
        "byte order mark": "\ufeff" + whole,
        "zero-width spaces": "```python\n" + whole.replace("def ", "def \u200b") + "```",
        "no-break spaces": "```python\n" + whole.replace("    ", "\u00a0" * 4) + "```",
        "HTML entities": "python code:\n\n" + html.escape(f"{function}", quote=False)
        .replace("->", "-&gt;"),
        "HTML tags": f"<pre><code class='python'>\n{whole}</code></pre>",
        "PYTHON in brackets": f"[PYTHON]\n{whole}[/PYTHON]\n[TESTS]\nassert {name}()\n[/TESTS]",
        "answer tags": f"<answer>\n{whole}</answer>",
        "end token": f"{fence}<|im_end|>\nuser\nThanks",
        "ANSI colours": f"```python\n\x1b[32m{whole}\x1b[0m```",
        "future import": f"```python\nfrom __future__ import annotations\n\n{whole}```",
        "decorated": f"```python\nimport functools\n\n{_decorated(whole, name)}```",
        "recursion limit": f"```python\nimport sys\nsys.setrecursionlimit(5000)\n{whole}```",
        "class beside it": f"```python\nclass Unused:\n    def {name}(self):\n        return 0\n\n"
        f"{whole}```",
        "method of the same name first": f"```python\nclass A:\n    def {name}(self):\n"
        f"        pass\n```\n{fence}",
    }  # fmt: skip


def _wrapped(function: str, name: str) -> str:
    """The function, whose result goes through a helper."""
    inner = function.replace(f"def {name}", "def _inner", 1).replace(f"{name}(", "_inner(")
    return f"{inner}\n\ndef {name}(*arguments):\n    return helper(_inner(*arguments)) if limit else 0\n"  # noqa: E501


def _decorated(whole: str, name: str) -> str:
    decorator = (
        "def plain(function):\n    @functools.wraps(function)\n    def call(*a, **k):\n"
        "        return function(*a, **k)\n    return call\n\n@plain\n"
    )
    return whole.replace(f"def {name}", decorator + f"def {name}", 1)


def wrappings(task: Task) -> dict[str, str]:
    return bodies(task) | definitions(task)
