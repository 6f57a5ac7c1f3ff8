"""The OpenAI-style requests and answers, for clients that speak nothing else.

A request becomes the same jobs that `/v1/score` and `/v1/generate` make, under the same limits; a
field that this server cannot honour is refused, never ignored. Beside OpenAI's own fields, these of
vLLM are accepted: ``prompt_logprobs``, ``top_k``, ``stop_token_ids``,
``include_stop_str_in_output``, ``return_token_ids``, ``return_tokens_as_token_ids``,
``add_special_tokens``.

The text of a completion is what it adds to that of its prompt, up to what ended it: without the
stop string or stop token, unless ``include_stop_str_in_output`` is set. ``token_ids`` and
``logprobs`` cover all tokens generated, the last of a stop string included.

Log-probs are those of the model at temperature 1 over the whole vocabulary, as vLLM gives them. All
of it is JSON, some 70 bytes a log-prob, so `/v1/score` is the better call for scoring.

Source: the API references of OpenAI and, for the extensions, of vLLM 0.32.
"""

from __future__ import annotations
