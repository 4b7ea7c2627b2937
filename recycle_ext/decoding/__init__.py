"""The decoding state, one step of it, and how many draft tokens a step has."""
