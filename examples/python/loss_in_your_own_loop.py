"""A training loop of your own: the served teacher's distributions, and the sparse divergence.

python examples/python/loss_in_your_own_loop.py STUDENT http://localhost:8000 ROWS.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import Divergence, TeacherClient, linear_sparse_jsd, teacher_distribution

name, url, rows_file = sys.argv[1:]
rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
model = AutoModelForCausalLM.from_pretrained(name)
head = model.get_output_embeddings().weight  # [V, d]
divergence = Divergence(beta=0.5)  # between forward KL, 0, and reverse KL, 1
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with TeacherClient(url, tokenizer=AutoTokenizer.from_pretrained(name)) as teacher:
    vocab_size = min(model.config.vocab_size, teacher.info.vocab_size)  # what both share
    for epoch in range(3):
        for first in range(0, len(rows), 8):
            scored = teacher.score(rows[first : first + 8], top_k=64)
            tokens = sum(len(one.scores) for one in scored)  # that this step learns
            step_loss = 0.0
            for one in scored:
                ids = torch.from_numpy(one.sample.token_ids.astype("int64"))[None]  # [1, L]
                hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]  # [L, d]
                hidden = hidden[one.sample.completion_start - 1 : -1]  # [T, d], each predicts one
                target = teacher_distribution([one], vocab_size)
                loss, _ = linear_sparse_jsd(hidden, head, target, divergence, normalizer=tokens)
                loss.backward()
                step_loss += loss.item()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: {step_loss:.4f} nats a token in the last step")
