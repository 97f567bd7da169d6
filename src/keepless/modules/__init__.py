"""Plans of module calls: a forward in pieces, measured by running it, and a model that recomputes calls by a plan."""
