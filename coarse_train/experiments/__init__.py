"""Tables of runs: a question, rows that are configs, and a sentence that says whether the claim held."""
