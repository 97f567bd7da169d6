"""Control: the whole line, from a model and a budget to a planned step."""
