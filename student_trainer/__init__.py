"""The student trainer: prompts come in, gradients go out; the teacher is across HTTP."""
