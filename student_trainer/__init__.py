"""The student trainer: prompts come in, gradients go out, the teacher is at the other end of HTTP."""
