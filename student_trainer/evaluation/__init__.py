"""Is a completion right? Text in, verdicts out: no model is known here."""
