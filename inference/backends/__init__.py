"""Ways to reach an expert: a model in this process, an adapter on a shared base, an OpenAI-compatible endpoint."""
