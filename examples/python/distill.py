"""Distil a served teacher into a student in memory, on rows in memory.

    python examples/python/distill.py STUDENT http://localhost:8000 OUTPUT_DIR

All flags of `student-trainer distill` are keywords of the same name.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import distill

name, url, output_dir = sys.argv[1:]
sums = [(f"{a} + {b} =", f" {a + b}") for a in range(10) for b in range(10)]

result = distill(
    AutoModelForCausalLM.from_pretrained(name),
    url,
    [{"prompt": prompt} for prompt, _ in sums[10:]],
    tokenizer=AutoTokenizer.from_pretrained(name),
    eval_dataset=[{"prompt": prompt, "completion": answer} for prompt, answer in sums[:10]],
    output_dir=output_dir,
    lmbda=1,  # on-policy: the student's own completions
    beta=0.5,
    max_new_tokens=8,
    max_steps=10,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    eval_strategy="steps",
    eval_steps=10,
    eval_on_start=True,
    save_strategy="no",
)
before, after = (e["eval/divergence"] for e in result.history if "eval/divergence" in e)
print(f"held-out divergence {before:.4f} -> {after:.4f} nats a token; in {result.output_dir}")
