"""The composite in use: expert backends, generation, terminal chat. Imports `modeling` only."""
