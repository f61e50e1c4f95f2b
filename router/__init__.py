"""The data plane: one OpenAI-compatible endpoint before many engines. ARCHITECTURE.md has its rooms."""
