"""Print a served teacher's log-probs of a completion, token by token, and its own completion.

    python examples/python/score_with_a_teacher.py TOKENIZER http://localhost:8000 PROMPT COMPLETION

TOKENIZER is a folder or Hub id of the teacher's tokenizer, or of any student of the same family.
"""

import sys

from transformers import AutoTokenizer

from shared.text import completion_text, token_text
from student_trainer import TeacherClient

name, url, prompt, completion = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
with TeacherClient(url, tokenizer=tokenizer) as teacher:
    print(f"{teacher.info.teacher.model}: {teacher.info.vocab_size} tokens")
    [scored] = teacher.score([{"prompt": prompt, "completion": completion}], top_k=3)
    [written] = teacher.generate([prompt], max_new_tokens=16)

scores = scored.scores  # numpy arrays, a row for each token of the completion
for row, token in enumerate(scored.sample.completion_ids):
    likeliest = ", ".join(
        f"{token_text(tokenizer, candidate)!r} {logprob:.2f}"
        for candidate, logprob in zip(scores.token_ids[row], scores.logprobs[row], strict=True)
    )
    own = scores.next_token_logprob[row]
    print(f"{token_text(tokenizer, token)!r} {own:.2f} nats; likeliest {likeliest}")
print(f"perplexity {2.718281828 ** -scores.next_token_logprob.mean():.2f}")
sample = written.sample
prompt_ids = sample.token_ids[: sample.completion_start]
text = completion_text(tokenizer, prompt_ids, sample.completion_ids)
print(f"it would write {text!r}")
