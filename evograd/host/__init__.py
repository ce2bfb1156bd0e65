"""A loss at other parameters, and a model that is left as it was."""
