"""Pictures alone decide: the question is always the same."""
