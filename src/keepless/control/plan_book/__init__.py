"""The plan book: what a planned model does about calls that its plan does not cover."""
