"""What is under way at once: completions, their scores, and the targets made of them."""
