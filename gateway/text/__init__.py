"""Text on one side, token ids on the other: everything of a model that needs no weights."""
